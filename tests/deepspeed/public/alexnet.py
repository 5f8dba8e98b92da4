"""DeepSpeedExamples' pipeline_parallelism/train.py: `alexnet.py CHECKOUT STAGES` trains its layers
(AlexNet's widths / 16, on random 32 x 32 images, since torchvision is not here)."""

import json
import runpy
import sys
import tempfile
from pathlib import Path

import stand_ins
import torch
from torch import nn

checkout, stages = Path(sys.argv[1]), sys.argv[2]


class AlexNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        c = (3, 4, 12, 24, 16, 16)
        convolutions = [nn.Conv2d(c[i], c[i + 1], 3, padding=1) for i in range(5)]
        layers = [layer for conv in convolutions for layer in (conv, nn.ReLU(inplace=True))]
        self.features = nn.Sequential(*layers, nn.MaxPool2d(2, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def images(**_):
    torch.manual_seed(0)
    return [(torch.randn(3, 32, 32), i % 10) for i in range(64)]


stand_ins.no_gpu()
stand_ins.module("torchvision.models", AlexNet=AlexNet, vgg19=None)
stand_ins.module("torchvision.datasets", CIFAR10=images)
changes = ("Resize", "Compose", "CenterCrop", "ToTensor", "Normalize")
nothing = dict.fromkeys(changes, lambda *_, **__: None)
stand_ins.module("torchvision.transforms", **nothing)
folder = checkout / "training/pipeline_parallelism"
config = json.loads((folder / "ds_config.json").read_text())
config |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    file.write(json.dumps(config))
    file.flush()
    sys.argv = ["train.py", f"--deepspeed_config={file.name}", f"-p={stages}", "-s=3"]
    sys.argv += ["--backend=gloo"]
    runpy.run_path(str(folder / "train.py"), run_name="__main__")
print("alexnet", stages)
