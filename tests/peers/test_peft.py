"""Adapters of the peft package itself, on transformers' models: what it saves is read, and what we
write it loads; the logits are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import write

from glm_core.pretrained import adapters
from glm_core.pretrained import peft as ours
from glm_core.pretrained.weights.reading import open_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("layout", ["glm", "glm4"])
@pytest.mark.filterwarnings("ignore")  # of peft and transformers
def test_logits_of_peft(layout: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "base", layout)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj", "gate_up_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"v_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "lora")
    checkpoint = open_checkpoint(folder)
    model = checkpoint.load(torch.float32)
    config, state = adapters.read(tmp_path / "lora", model.config)
    adapters.load_adapter(tmp_path / "lora", model)
    tokens = torch.arange(24).reshape(1, 24) * 3
    position = torch.arange(24).expand(1, 2, 24)
    ends = torch.arange(1, 25, dtype=torch.int32)[None]
    with torch.no_grad():
        wanted = theirs(tokens).logits
        got = model.logits(tokens, position, torch.zeros_like(ends), ends)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        ours.write(tmp_path / "again", config, state, checkpoint.layout, model.config)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert not torch.allclose(plain(tokens).logits, wanted, rtol=1e-2, atol=1e-2)
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
        torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
