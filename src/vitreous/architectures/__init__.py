"""Whole networks, one file each.

Importing this package makes them known to `timm.create_model`.
"""

import importlib
from pathlib import Path

for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    importlib.import_module(f"{__name__}.{file.stem}")
