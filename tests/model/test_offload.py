"""Layers that are fetched for every step give the tokens of the model that is in memory whole, from
files and from main memory, after an interruption too; a failing or changed file is named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import stored
from kinds import GREEDY, model, prompts
from safetensors.torch import save_file

from glm_core import dispatch
from glm_core.backends import registry
from glm_core.errors import CheckpointError
from glm_core.model import offload
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.offload import StreamedBlock, stream_from_host, streamed_layers
from glm_core.model.quantize import Quantization
from glm_core.model.runner import DecodeRow, Runner
from glm_core.planner.offload import OffloadCost
from glm_core.pretrained.weights import streaming, writing
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.streaming import LayerFiles, load_streamed

NUM_LAYERS = 4
CPU = torch.device("cpu")
built = pytest.mark.skipif(not registry.probe("cpu").ok, reason="backend cpu is not built")
F32 = torch.float32
SHORT = dataclasses.replace(GREEDY, max_tokens=4)


def written(folder: Path, kind: str, bits: int | None) -> Path:
    """Writes a checkpoint of our own layout."""
    built = model(kind, num_layers=NUM_LAYERS)
    folder.mkdir()
    save_file({n: p.detach() for n, p in built.named_parameters()}, folder / "model.safetensors")
    described = {"model_type": "glm-core", **dataclasses.asdict(built.config)}
    (folder / "config.json").write_text(json.dumps(described))
    if bits is None:
        return folder
    return converted(folder, "glm-core", quantize=Quantization(bits=bits))


def converted(folder: Path, layout: str, **options: Any) -> Path:
    """Writes the checkpoint once more, in another form."""
    writing.convert(open_checkpoint(folder), folder / "again", writing.target(layout, **options))
    return folder / "again"


def replies(built: GLM, kind: str, **options: Any) -> list[list[int]]:
    asked = prompts(kind)[:3]
    return [g.tokens for g in generate(built, asked, SHORT, **options)]


def logits(built: GLM, kind: str) -> torch.Tensor:
    """Returns the logits of a decode step."""
    prompt, runner = prompts(kind)[0], Runner(built, 1)
    runner.prefill(0, [prompt])
    return runner.decode([DecodeRow(9, prompt, len(prompt.tokens))])


@built
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["glm-130b", "glm-4"])
def test_tokens_are_those_of_the_whole_model(tmp_path: Path, kind: str, bits: int | None) -> None:
    """One by one, in a batch, and with the prompts padded; from files and from main memory."""
    weights = open_checkpoint(written(tmp_path / "x", kind, bits))
    ways = ({"slots": 1}, {"slots": 3}, {"padded": True})
    memory = weights.load(F32, quantized=True)
    with registry.use("cpu") as session:
        whole, exact = [replies(memory, kind, **way) for way in ways], logits(memory, kind)
        assert len({tuple(t) for t in whole[0]}) > 1
        built = load_streamed(LayerFiles(weights), F32, CPU, range(NUM_LAYERS), 2)
        assert [replies(built, kind, **way) for way in ways] == whole
        assert torch.equal(logits(built, kind), exact)
        layers = streamed_layers(NUM_LAYERS, 1)
        stream_from_host(memory, layers, 2, CPU)
        assert replies(memory, kind, **ways[1]) == whole[1]
        assert sum(isinstance(b, StreamedBlock) for b in memory.blocks) == len(layers) == 3
    assert any("StreamedBlock" in f.reason for f in session.fallbacks)


def test_streamed_layers_are_spread() -> None:
    assert streamed_layers(8, 4) == [1, 3, 5, 7]
    assert streamed_layers(40, 39) == [39]
    assert streamed_layers(3, 0) == [0, 1, 2]
    assert streamed_layers(3, 3) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_separate_rows_and_other_dtypes(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: Any
) -> None:
    """transformers' layout stores q, k and v apart; values are converted piece by piece."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1 << 10)
    weights = open_checkpoint(converted(written(tmp_path / "x", "glm-4", None), "glm"))
    whole = weights.load(dtype, quantized=True)
    buffer = weights.load(dtype, quantized=True).blocks[0]
    files = LayerFiles(weights)
    for layer, block in enumerate(whole.blocks):
        files.fetch(layer, buffer)
        for name, tensor in offload.tensors(block).items():
            assert torch.equal(offload.tensors(buffer)[name], tensor), name
    assert files.num_bytes([0]) == sum(t.numel() for t in offload.tensors(buffer).values()) * 4
    assert files.gb_s([0, 1], dtype) > 0
    assert files.gb_s([0, 1], dtype, cached=True) > 0


@built
def test_an_interrupted_step_leaves_the_next_one_right(tmp_path: Path) -> None:
    kind = "glm-130b"
    weights = open_checkpoint(written(tmp_path / "x", kind, None))
    built = load_streamed(LayerFiles(weights), F32, CPU, range(NUM_LAYERS), 2)
    calls = 0

    def interrupt(op: dispatch.Op, args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return dispatch.run(op, args, kwargs)

    with registry.use("cpu"):
        with dispatch.intercept(interrupt), pytest.raises(KeyboardInterrupt):
            replies(built, kind)
        assert replies(built, kind) == replies(weights.load(F32), kind)


@built
def test_a_file_that_changes_or_ends_early_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    kind, folder = "glm-4", written(tmp_path / "x", "glm-4", None)
    file = folder / "model.safetensors"
    weights = open_checkpoint(folder)
    with registry.use("cpu"):
        expected = replies(weights.load(F32), kind)
        built = load_streamed(LayerFiles(weights), F32, CPU, range(NUM_LAYERS), 2)
        good, facts = file.read_bytes(), file.stat()
        with file.open("r+b") as handle:  # in place: the open file sees it
            handle.truncate(len(good) // 2)
        with pytest.raises(CheckpointError, match="was changed while the model runs"):
            replies(built, kind)
        with monkeypatch.context() as patch:
            kept = (facts.st_mtime_ns, facts.st_size)
            patch.setattr(streaming, "_stamp", lambda handle, file: kept)
            with pytest.raises(CheckpointError, match=r"could not be read \(ends at byte"):
                replies(built, kind)
        with file.open("r+b") as handle:
            handle.write(good)
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert replies(built, kind) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [("heads", "mixes the rows of q, k and v"), ("bin", "pytorch_model.bin is no safetensors")],
)
def test_what_cannot_be_read_in_place_is_refused(tmp_path: Path, change: str, message: str) -> None:
    if change == "heads":
        folder = tmp_path / "x"
        stored(folder, "chatglm-6b")
    else:
        folder = written(tmp_path / "x", "glm-4", None)
        whole = open_checkpoint(folder)
        state = {k: s.read().clone() for k, s in whole.files.ranks[0].items()}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message) as refusal:
        LayerFiles(open_checkpoint(folder))
    assert "convert --to glm-core" in str(refusal.value)


class FakeDevice:
    """Records what is asked of a device's streams."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.events = 0

    def Stream(self, device: Any) -> FakeDevice:  # torch's name
        return self

    def Event(self) -> Any:  # torch's name
        self.events += 1
        number, log = self.events, self.log

        class Event:
            def record(self) -> None:
                log.append(("record", number))

            number = self.events

        return Event()

    def stream(self, stream: FakeDevice) -> contextlib.AbstractContextManager[None]:
        self.log.append(("enter", 0))
        return contextlib.nullcontext()

    def wait_event(self, event: Any) -> None:
        self.log.append(("wait", event.number))

    def synchronize(self) -> None:
        self.log.append(("synchronize", 0))


def test_a_buffer_is_filled_after_its_last_use(monkeypatch: Any) -> None:
    """On devices with streams a copy waits for an event that follows the buffer's last use, and the
    layer is called when its copy is complete. No GPU ran this."""
    fake, built = FakeDevice(), model("glm-4", num_layers=NUM_LAYERS)
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    real = offload._CopyStream.__init__

    def initialise(self: Any, device: torch.device) -> None:
        real(self, torch.device("cuda"))

    monkeypatch.setattr(offload._CopyStream, "__init__", initialise)
    expected = replies(model("glm-4", num_layers=NUM_LAYERS), "glm-4")
    stream_from_host(built, range(NUM_LAYERS), 2, CPU)
    for fetching in built.blocks[0]._stream._ahead:  # type: ignore[union-attr]  # a StreamedBlock
        fetching.buffer.register_forward_hook(lambda *_: fake.log.append(("used", 0)))
    assert replies(built, "glm-4") == expected
    asked = [what for what, _ in fake.log if what in ("used", "record")]
    assert asked == ["used", "record"] * (len(asked) // 2)
    waits = [n for what, n in fake.log if what == "wait"]
    assert waits == list(range(1, len(waits) + 1))
    assert len(waits) >= fake.events - 2
    assert sum(what == "synchronize" for what, _ in fake.log) == len(waits)


def test_the_cost_is_said(tmp_path: Path) -> None:
    cost = OffloadCost(23, 40, 9_400_000_000, 1.9, "disk", True)
    assert cost.step_s == pytest.approx(4.947, abs=1e-3)
    assert cost.text(16) == (
        "offload: 23 of 40 layers come from disk at every step: 9.4 GB at 1.9 GB/s (measured) "
        "take 4.95 s, so at most 0.202 tokens/s a sequence, 3.23 for 16"
    )
