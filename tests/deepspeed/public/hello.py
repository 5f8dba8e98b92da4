"""DeepSpeedExamples' own train_bert_ds.py: `hello.py CHECKOUT OUT` trains a tiny model, saves, and
goes on from the checkpoint."""

import os
import sys
from pathlib import Path

import stand_ins

checkout, out = Path(sys.argv[1]), Path(sys.argv[2])
text = stand_ins.Rows({"text": f"line {i} of a text that says {i * i}"} for i in range(64))
stand_ins.module("datasets", load_dataset=lambda *_, **__: text, arrow_dataset=stand_ins.Quiet())
stand_ins.module("fire")
stand_ins.module("loguru", logger=stand_ins.Quiet())
stand_ins.module("pytz", timezone=lambda name: None)
stand_ins.module("sh", git=stand_ins.Quiet())
stand_ins.module("torch.utils.tensorboard", SummaryWriter=lambda **_: stand_ins.Quiet())
sys.path.insert(0, str(checkout / "training/HelloDeepSpeed"))
import train_bert_ds as script  # noqa: E402

script.AutoTokenizer = stand_ins.Words
experiment = out / "experiment"
(experiment / "tb_dir").mkdir(parents=True, exist_ok=True)
script.create_experiment_dir = lambda *_: experiment
(experiment / "hparams.json").write_text("{}")
size = {"num_layers": 1, "num_heads": 2, "ff_dim": 16, "h_dim": 16, "max_seq_length": 32}
script.train(checkpoint_dir=str(out), num_iterations=4, batch_size=2, **size)
script.train(load_checkpoint_dir=str(experiment), num_iterations=6, batch_size=2, **size)
saved = {p.name for p in experiment.glob("global_step*")}
assert saved == {"global_step3", "global_step4"}, saved
print("hello", os.environ["RANK"], saved)
