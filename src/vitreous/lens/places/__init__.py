"""Where in the image the tokens of any model are: coordinates sent through the model's own calls, and snapped to a grid.

    shadows.py   `Shadows`: the places of every tensor of a pass, and the table of rules
    fields.py    places of one tensor, and what a rule gets
    moves.py     rules for calls that move values: views, gathers, joins, padding
    blends.py    rules for calls that mix them: sums, products, convolution, pooling
    layout.py    `Layout`: what an attention reads, as windows, grid and prefix
"""

from vitreous.lens.places.layout import Layout, channel, layout
from vitreous.lens.places.shadows import Shadows

__all__ = ["Layout", "Shadows", "channel", "layout"]
