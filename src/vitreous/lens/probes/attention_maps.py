"""What the class token looks at, head by head; without a class token, what is looked at.

Object queries, latents and prompts one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.lens.layer_features import QUERIES, LayerFeatures
from vitreous.lens.probe import Component, Observer, Probe


class MapsObserver(Observer):
    def on_layer(self, features: LayerFeatures) -> None:
        if features.attention is not None:
            self.readout.maps[f"attention/{features.layer}"] = features.attention.unflatten(-1, features.grid)
        for number in range(0 if features.queries is None else features.queries.shape[1]):
            picture = features.queries[:, number].unflatten(-1, features.grid)
            self.readout.maps[f"query{number + 1}/{features.layer}"] = picture
        if features.by_channel is not None:
            self.readout.maps[f"attention_channels/{features.layer}"] = features.by_channel


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Probe):
    """The attention of each layer on the grid of its keys.

    Where several tokens stand at each place, as with a token per channel (ChannelViT), also that to
    each of them, a slice each; the one map is then their mean.
    """

    order: ClassVar[int] = 60
    observer: ClassVar[type[Observer]] = MapsObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("attention", "Attention", low=0, high=1, per_head=True,
                  explains="What the class token looks at, head by head; without a class token, what is looked at on average."),
        *(Component(f"query{n}", f"Query {n}", low=0, high=1, per_head=True, scored=False, curves=False,
                    explains=f"What query {n} looks at, head by head: an object query, a latent or a prompt, without a place.")
          for n in range(1, QUERIES + 1)),
        Component("attention_channels", "Attention by channel", low=0, high=1, per_head=True, scored=False, curves=False,
                  explains="Attention to each of the tokens that stand at one place, such as one per channel; the other map is "
                           "their mean."),
    )  # fmt: skip
