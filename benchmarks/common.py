"""What every benchmark here needs: the machine and versions, photographs, and results written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import platform
import tarfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image


def photographs(data: Path, count: int) -> torch.Tensor:
    """The first `count` of the 500 ImageNet photographs, normalised for the ViT-Tiny of the same folder: (n, 3, 224, 224)."""
    images = []
    with tarfile.open(data / "imagenet1k-samples" / "imagenet_500_224px.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg") and len(images) < count:
                images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vit_tiny(data: Path, **settings) -> torch.nn.Module:
    """The real ImageNet ViT-Tiny/16; settings of timm, such as img_size."""
    return timm.create_model(f"local-dir:{data}/weights/vit_tiny_patch16_224", pretrained=True, **settings).eval()


def machine() -> dict[str, str]:
    """Where and with what a result was made."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def write(path: Path, result: dict) -> None:
    """Write a result with its machine, atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    part.replace(path)
