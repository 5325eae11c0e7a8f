"""Makes opening.jpg, the picture at the head of the README, with the real ImageNet ViT-Tiny/16.

    python docs/pictures/opening.py WEIGHTS PHOTOGRAPHS

WEIGHTS: folder of the ViT-Tiny/16 in timm's layout. PHOTOGRAPHS: folder with coffee.png and rocket.jpg of scikit-image
(skimage/data): coffee by Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0; rocket by SpaceX, public domain.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFont

from vitreous import Direction, look
from vitreous.data.views import Views

SIDE, GAP, HEAD = 224, 10, 40
HEAT = ((18, 16, 38), (108, 22, 100), (214, 64, 62), (250, 164, 40), (252, 250, 190))
COLD_WARM = ((24, 74, 140), (120, 170, 210), (245, 245, 242), (240, 170, 110), (170, 60, 20))
SHOWN = {"coffee.png": ("k1", 8), "rocket.jpg": ("u1", 6)}  # vectors whose largest entry points away from the object
DIRECTION = Path(__file__).parents[2] / "benchmarks" / "foreground" / "vit_tiny_patch16_224.safetensors"
CAPTIONS = (
    "the image",
    "class attention,\nlast layer",
    "singular vector, signed by\nits largest entry: inverted",
    "the same, signed as\nVitreous does",
    "foreground map,\nno masks, no training",
)


def coloured(values: np.ndarray, colours, signed: bool) -> Image.Image:
    """(rows, cols) -> a picture of crisp cells; signed values have 0 in the middle of the colours."""
    low, high = (-abs(values).max(), abs(values).max()) if signed else (values.min(), values.max())
    share = (values - low) / max(high - low, 1e-12)
    stops = np.linspace(0, 1, len(colours))
    cells = np.stack([np.interp(share, stops, [colour[c] for colour in colours]) for c in range(3)], axis=-1)
    return Image.fromarray(cells.round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def row(model: torch.nn.Module, direction: Direction, path: Path) -> list[Image.Image]:
    """The five pictures of one photograph."""
    maps, (component, layer) = look(model, [path], direction=direction, noise=0).maps, SHOWN[path.name]
    ours = maps[component, layer][0]
    usual = ours * np.sign(ours.flat[abs(ours).argmax()])  # scikit-learn's svd_flip
    print(f"{path.name}: {component} of layer {layer}, confidence of our sign {maps.confidence(component, layer)[0]:.3f}")
    return [
        Image.fromarray(Views(model, [path])[0].picture),
        coloured(maps["attention", 11][0], HEAT, signed=False),
        coloured(usual, COLD_WARM, signed=True),
        coloured(ours, COLD_WARM, signed=True),
        coloured(maps["foreground"][0], HEAT, signed=False),
    ]


def main(weights: str, photographs: str) -> None:
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    rows = [row(model, Direction.load(DIRECTION), Path(photographs) / name) for name in SHOWN]
    size = (len(CAPTIONS) * (SIDE + GAP) - GAP, HEAD + len(rows) * (SIDE + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, caption in enumerate(CAPTIONS):
        draw.multiline_text((column * (SIDE + GAP), 0), caption, fill=(30, 30, 30), font=font, spacing=2)
        for line, pictures in enumerate(rows):
            sheet.paste(pictures[column], (column * (SIDE + GAP), HEAD + line * (SIDE + GAP)))
    sheet.save(Path(__file__).with_name("opening.jpg"), quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
