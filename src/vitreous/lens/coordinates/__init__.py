"""Which place of the image every tensor of a forward pass stands for.

docs/tap.md follows a pass through these files in calling order.

coordinate_tracer.py   `CoordinateTracer`: coordinates of the tensors of a pass; the table of rules
field.py               `CoordinateField` of one tensor; `TensorOp`, what a rule gets
contraction.py         `Contraction`: matmul and einsum in one form, with labels
view_rules.py          rules for calls that move values: views, gathers, joins, padding
mixing_rules.py        rules for calls that mix values: sums, products, convolution, pooling
token_names.py         `TokenNames`: the parameters of tokens that have no place
layout.py              `Layout`: windows, grid and prefix of what an attention reads
"""
