"""See every attention of any model while it happens: `watch` a pass, after a `trace` has told where its tokens are.

seeing.py    the two verbs, and the function mode that sees every call of a pass
running.py   which module runs now, and what became of its tokens
found.py     an attention as it was found, and the fused route
softmax.py, facts.py, axes.py    the route of models that write attention out: product, softmax, contraction with V
tracer.py    the traced pass: shapes, places and kinds of every call
capture.py   brings each attention to one form, checks it and shows it
call.py      what is shown: a `AttentionCall`
"""

from vitreous.lens.tap.capture_pass import (
    AttentionCall,
    Layout,
    Layouts,
    PassResult,
    Refusal,
    Traced,
    trace,
    watch,
)

__all__ = ["AttentionCall", "Layout", "Layouts", "PassResult", "Refusal", "Traced", "trace", "watch"]
