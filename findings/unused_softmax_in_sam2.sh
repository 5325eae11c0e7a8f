#!/usr/bin/env bash
# transformers 5.23.0, torch 2.15.0.
# Every block of the image encoder of SAM 2 computes a softmax of queries times keys that nothing uses, before its attention:
# between the heads of each token (its axes are not yet those of tokens), and also with attn_implementation="sdpa". The output is
# the same to the bit if that softmax gives zeros. Whoever collects softmaxes of the model takes these for its attention.
#
# Seen with transformers 5.23.0 and torch 2.15.0 on a CPU:
#   blocks: 2, softmaxes: 2, of shapes [(1, 64, 2, 2), (1, 64, 2, 2)] for 2 heads
#   output with zeros in their place: the same
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from torch.overrides import TorchFunctionMode
from transformers import Sam2HieraDetConfig, Sam2HieraDetModel


class Softmaxes(TorchFunctionMode):
    def __init__(self, zeros):
        super().__init__()
        self.zeros, self.shapes = zeros, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.softmax:
            return out
        self.shapes.append(tuple(out.shape))
        return torch.zeros_like(out) if self.zeros else out


torch.manual_seed(0)
config = Sam2HieraDetConfig(
    hidden_size=16, num_attention_heads=2, image_size=[32, 32], blocks_per_stage=[2], embed_dim_per_stage=[16],
    num_attention_heads_per_stage=[2], window_size_per_stage=[8], global_attention_blocks=[0, 1], num_query_pool_stages=0,
    window_positional_embedding_background_size=[7, 7],
)
model = Sam2HieraDetModel._from_config(config, attn_implementation="sdpa").eval()
image, outputs = torch.randn(1, 3, 32, 32), []
for zeros in (False, True):
    with torch.no_grad(), Softmaxes(zeros) as softmaxes:
        outputs.append(model(image).last_hidden_state)
print(f"blocks: {len(model.blocks)}, softmaxes: {len(softmaxes.shapes)}, of shapes {softmaxes.shapes} for 2 heads")
assert softmaxes.shapes == [(1, 64, 2, 2)] * len(model.blocks)
assert torch.equal(*outputs)
print("output with zeros in their place: the same")
PY
