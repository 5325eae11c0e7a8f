#!/usr/bin/env bash
# torch 2.15.0.
# A query whose keys are all masked: torch.nn.MultiheadAttention gives NaN for it with need_weights=True (the default), and the
# output bias with need_weights=False. scaled_dot_product_attention gives 0 with its plain and with its fused kernel.
# So looking at the weights of such a model changes its output.
#
# Seen with torch 2.15.0 on a CPU:
#   need_weights=True:  nan nan nan nan
#   need_weights=False: 0 0 0 0
#   scaled_dot_product_attention, MATH and FLASH_ATTENTION: 0 0 0 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
attention = torch.nn.MultiheadAttention(4, 1, batch_first=True).eval()
x, hidden = torch.randn(1, 3, 4), torch.zeros(3, 3, dtype=torch.bool)
hidden[1] = True  # True: this query may not see this key
with torch.no_grad():
    rows = {asked: attention(x, x, x, attn_mask=hidden, need_weights=asked)[0][0] for asked in (True, False)}
for asked, out in rows.items():
    print(f"need_weights={asked}:", *out[1].tolist())
assert rows[True][1].isnan().all()
assert (rows[False][1] == attention.out_proj.bias).all()
assert torch.allclose(rows[True][[0, 2]], rows[False][[0, 2]], atol=1e-6)
for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
    with sdpa_kernel(backend):
        row = scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=~hidden)[0, 0, 1]
    print(f"scaled_dot_product_attention, {backend.name}:", *row.tolist())
    assert (row == 0).all()
PY
