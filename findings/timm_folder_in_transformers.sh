#!/usr/bin/env bash
# timm 1.0.31, transformers 5.23.0, torch 2.15.0.
# timm's own writer of model folders (save_for_hf, which push_to_hf_hub uses) stores the arguments of the network, num_classes
# among them, under model_args. timm opens such a folder. transformers' AutoModelForImageClassification recognises it as a timm
# model, then gives num_classes to timm twice.
#
# Seen with timm 1.0.31, transformers 5.23.0, torch 2.15.0:
#   timm: 5 classes
#   transformers: TypeError: ... got multiple values for keyword argument 'num_classes'
# The same folder without num_classes in model_args: equal logits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.15.0 torchvision==0.29.2 timm==1.0.31 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification

arguments = {"num_classes": 5, "img_size": 32, "patch_size": 8}
save_for_hf(timm.create_model("vit_tiny_patch16_224", **arguments), "folder", model_args=arguments)
model = timm.create_model("local-dir:folder", pretrained=True).eval()
print("timm:", model.num_classes, "classes")
try:
    AutoModelForImageClassification.from_pretrained("folder")
    raise SystemExit("transformers opens it: this has changed")
except TypeError as error:
    print("transformers: TypeError:", error)
    assert "multiple values for keyword argument 'num_classes'" in str(error)

config = json.loads(Path("folder/config.json").read_text())
del config["model_args"]["num_classes"]
Path("folder/config.json").write_text(json.dumps(config))
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    theirs = AutoModelForImageClassification.from_pretrained("folder").eval()(images).logits
    print("without num_classes in model_args: largest difference of logits", (theirs - model(images)).abs().max().item())
    assert torch.allclose(theirs, model(images), atol=1e-5)
PY
