"""Capture every attention of any model in a forward pass, checked against its own output.

`trace` runs one image and finds where the tokens of every call are; `watch` runs a batch and
gives every attention to a callback as an `AttentionCall`. docs/tap.md follows a batch through
these files in calling order.

capture_pass.py     `watch`, `trace`, and the function mode that intercepts every call of a pass
module_stack.py     `ModuleStack`: which module runs now, and the state of its tokens
attention_op.py     `AttentionOp`: an intercepted attention; the fused route
softmax.py          `DataFlow`: the written-out route: product, softmax, product with V
dataflow.py         roles that tensors have on this route: `Scores`, `Weights`, `WeightedSum`
axes.py             `Axes` followed through views
tracer.py           `Tracer`: shapes, coordinates and kinds of every call, from one image
capture.py          `Capture`: arranges every attention, checks it, and calls the callback
attention_call.py   `AttentionCall`: what the callback gets
tensor_set.py       `TensorSet`: which tensors are known, without holding them
"""

from vitreous.lens.tap.capture_pass import AttentionCall, Layouts, Refusal, trace, watch

__all__ = ["AttentionCall", "Layouts", "Refusal", "trace", "watch"]
