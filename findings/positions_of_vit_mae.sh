#!/usr/bin/env bash
# transformers 5.23.0, torch 2.15.0.
# ViTMAEForPreTraining that is made from a configuration has fixed sine-cosine positions, which are not learned. They are all 0: in
# the encoder and in the decoder. So the decoder cannot tell one hidden patch from another and paints the same pixels in all of them.
# Whoever pre-trains from scratch with it learns without positions, and no message says so; weights that are loaded bring their own.
#
# Seen with transformers 5.23.0 and torch 2.15.0 on a CPU:
#   largest position: encoder 0.0, decoder 0.0; learned: False, False
#   different paintings among 12 hidden patches: 1
#   after the tables are filled by the module's own function: 12
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

torch.manual_seed(0)
config = ViTMAEConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4,
    decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64,
)
model = ViTMAEForPreTraining(config).eval()
tables = [model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed]
largest, learned = [t.abs().max().item() for t in tables], [t.requires_grad for t in tables]
print(f"largest position: encoder {largest[0]}, decoder {largest[1]}; learned: {learned[0]}, {learned[1]}")


def different():
    with torch.no_grad():
        out = model(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), noise=torch.arange(16.0)[None])
    painted = out.logits[0][out.mask[0].bool()]
    return len({tuple((row * 1e4).round().int().tolist()) for row in painted}), len(painted)


before, hidden = different()
print(f"different paintings among {hidden} hidden patches: {before}")
with torch.no_grad():
    for table in tables:
        table[0, 1:] = build_2d_sinusoidal_position_embedding(4, 4, table.shape[-1])
after, _ = different()
print(f"after the tables are filled by the module's own function: {after}")
assert largest == [0.0, 0.0] and learned == [False, False] and before == 1 and after == hidden
PY
