"""Where a program runs: its command line, versions, machine and device."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vitreous.base.errors import SettingError

PACKAGES = ("vitreous", "torch", "torchvision", "timm", "numpy", "pillow", "safetensors")


def command_line() -> str:
    """What was typed, as far as it was `vitreous` or `python -m vitreous`.

    Else that it came from Python.
    """
    *_, folder, name = "", "", *Path(sys.argv[0]).parts
    ours = name in ("vitreous", "vitreous.exe") or (folder, name) == ("vitreous", "__main__.py")
    return shlex.join(["vitreous", *sys.argv[1:]]) if ours else "from Python"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """What decides on speed and on exact repetition."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
    }


def torch_device(name: str) -> torch.device:
    """The device of that name, or the best there is for "auto".

    Raises SettingError if this machine does not have it.
    """
    if name == "auto":
        return torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SettingError(f"Found --device {name}: {reason}. Expected a device of this machine. Use auto or cpu.") from error
    return device
