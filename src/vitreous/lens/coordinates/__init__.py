"""Where in the image the tokens of any model are: coordinates sent through the model's own calls, and snapped to a grid.

shadows.py   `Shadows`: the places of every tensor of a pass, and the table of rules
fields.py    places of one tensor, and what a rule gets
moves.py     rules for calls that move values: views, gathers, joins, padding
mixing_rules.py rules for calls that mix them: sums, products, convolution, pooling
layout.py    `Layout`: what an attention reads, as windows, grid and prefix
"""

from vitreous.lens.coordinates.coordinate_tracer import Shadows
from vitreous.lens.coordinates.layout import Layout, channel, layout

__all__ = ["Layout", "Shadows", "channel", "layout"]
