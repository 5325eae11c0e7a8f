"""The plate of SVD-ViT's paper: left singular vectors 1 to 3 after blocks 1 and 10, plain beside SVD-ViT.

    python benchmarks/svd_vit/plate.py PHOTOGRAPHS [--masks MASKS] --plain MODEL [--svd-vit MODEL] [--out plate.png]

MODEL: a folder of a model or run, Vitreous's or timm's. PHOTOGRAPHS: files and folders, of which the first --count are
shown. The vectors are of the raw patch features, as in the paper: uncentred, without the class token, one after the other
by singular value. Each is turned so that it goes along with the class attention of the model's own later half; masks play
no part in that. Under each stands the AUROC of the map against the mask, if there is one: 0.5 is chance, below it the map
is inverted. The edge of the mask is drawn on the photograph.

plate.jpg is of coffee.png and rocket.jpg of scikit-image (skimage/data): coffee by Rachel Michetti, courtesy of Pikolo
Espresso Bar, CC0; rocket by SpaceX, public domain. Their masks are OUTLINES, drawn by hand. It shows the plain ImageNet
ViT-Tiny/16; there are no published weights of SVD-ViT to set beside it, but any two runs can be:

    vitreous train DATA --pretrained --image-size 224 --epochs 10 --lr 1e-4 --out plain
    vitreous train DATA --pretrained --image-size 224 --epochs 10 --lr 1e-4 --out spc --graft spc:after=11
    python benchmarks/svd_vit/plate.py PHOTOGRAPHS --plain plain --svd-vit spc
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from vitreous import load, look
from vitreous.data.sources.listing import FileSamples
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.views import Views
from vitreous.hosts.host import host_of
from vitreous.lens.formulas.maps import signed, singular_maps, standardised
from vitreous.lens.formulas.scores import auroc, coverage

SIDE, GAP, HEAD, FOOT, LEFT = 112, 6, 34, 16, 20
COLD_WARM = ((24, 74, 140), (120, 170, 210), (245, 245, 242), (240, 170, 110), (170, 60, 20))
RANK = 3
OUTLINES = {  # in pixels of the photograph: polygons, and of two points the ellipse in that box
    "coffee.png": ([(77, 75), (480, 388)], [(172, 18), (410, 285)]),
    "rocket.jpg": ([(322, 125), (335, 145), (336, 406), (308, 406), (309, 145)],),
}


def components(model: nn.Module, pixels: torch.Tensor, blocks: list[int]) -> tuple[dict[int, torch.Tensor], tuple[int, int]]:
    """{block: maps (B, 3, P)} of one model, signed by its class attention, and the grid of their patches.

    blocks: counted from 1, as in the paper.
    """
    outputs: dict[int, torch.Tensor] = {}
    prefix = host_of(model).prefix

    def keep(number: int):
        return lambda block, arguments, out: outputs.update({number: out[:, prefix:].detach()})  # inserted tokens are left out

    handles = [model.blocks[number - 1].register_forward_hook(keep(number)) for number in blocks]
    try:
        reading = look(model, pixels, probes=["attention_maps"], noise=0)
    finally:
        for handle in handles:
            handle.remove()
    later = range(len(model.blocks) // 2, len(model.blocks))
    attention = [torch.from_numpy(reading.maps["attention", layer]).float() for layer in later]
    reference = sum(standardised(one.clamp_min(1e-9).log().flatten(1)) for one in attention)
    maps = {number: signed(singular_maps(x, RANK, rows="raw")[0], attention=reference).maps for number, x in outputs.items()}
    return maps, tuple(attention[0].shape[1:])


def with_outlines(samples: FileSamples) -> FileSamples:
    """The photographs, those of OUTLINES with their masks."""
    for i, name in enumerate(samples.names):
        if name in OUTLINES:
            mask = Image.new("L", samples.image(i).size)
            for points in OUTLINES[name]:
                draw = ImageDraw.Draw(mask)
                (draw.ellipse if len(points) == 2 else draw.polygon)(points, fill=255)
            file = io.BytesIO()
            mask.save(file, "PNG")
            samples.foregrounds[name] = (f"{name}, outline", file.getvalue())
    return samples


def coloured(values: np.ndarray) -> Image.Image:
    """(rows, cols), with 0 in the middle of the colours -> a picture of crisp cells."""
    share = values / max(abs(values).max(), 1e-12) / 2 + 0.5
    stops = np.linspace(0, 1, len(COLD_WARM))
    cells = np.stack([np.interp(share, stops, [colour[c] for colour in COLD_WARM]) for c in range(3)], axis=-1)
    return Image.fromarray(cells.round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def outlined(picture: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """The photograph with the edge of its mask in white."""
    image = picture.copy()
    if mask is not None:
        inner = mask.copy()
        for axis in (0, 1):
            for step in (-2, 2):
                inner &= np.roll(mask, step, axis)
        image[mask & ~inner] = 255
    return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def plate(models: dict[str, nn.Module], views: Views, count: int, blocks: list[int]) -> tuple[Image.Image, list[dict]]:
    """The picture, and its numbers: image, model, block, component, AUROC."""
    chosen = [views[i] for i in range(min(count, len(views)))]
    pixels = torch.stack([view.pixels for view in chosen])
    made = {name: components(model, pixels, blocks) for name, model in models.items()}
    columns = 1 + RANK * len(blocks)
    cell = SIDE + FOOT + GAP
    sheet = Image.new("RGB", (LEFT + columns * (SIDE + GAP), HEAD + len(chosen) * len(models) * cell), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    for column in range(1, columns):
        block, number = blocks[(column - 1) // RANK], (column - 1) % RANK + 1
        draw.text((LEFT + column * (SIDE + GAP), 12), f"block {block}, #{number}", fill=(30, 30, 30), font=font)
    numbers: list[dict] = []
    for i, view in enumerate(chosen):
        for j, (name, (maps, grid)) in enumerate(made.items()):
            top = HEAD + (i * len(models) + j) * cell
            title = Image.new("RGB", (SIDE, LEFT - 4), "white")
            ImageDraw.Draw(title).text((2, 0), name, fill=(30, 30, 30), font=small)
            sheet.paste(title.rotate(90, expand=True), (0, top))
            if j == 0:
                sheet.paste(outlined(view.picture, view.mask), (LEFT, top))
            for b, block in enumerate(blocks):
                for number in range(RANK):
                    values = maps[block][i, number]
                    left = LEFT + (1 + b * RANK + number) * (SIDE + GAP)
                    sheet.paste(coloured(values.unflatten(0, grid).numpy()), (left, top))
                    score = None if view.mask is None else auroc(values, coverage(view.mask, grid)).item()
                    numbers.append({"image": view.name, "model": name, "block": block, "component": number + 1, "auroc": score})
                    if score is not None:
                        draw.text((left, top + SIDE + 1), f"AUROC {score:.2f}", fill=(30, 30, 30), font=small)
    return sheet, numbers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="+")
    parser.add_argument("--masks")
    parser.add_argument("--plain", required=True)
    parser.add_argument("--svd-vit")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--out", type=Path, default=Path("plate.png"))
    given = parser.parse_args(arguments)
    models = {"plain": load(given.plain).eval()} | ({"SVD-ViT": load(given.svd_vit).eval()} if given.svd_vit else {})
    samples = unlabelled(given.photographs, given.masks)
    views = Views(models["plain"], samples if given.masks else with_outlines(samples))
    sheet, numbers = plate(models, views, given.count, given.blocks)
    quality = {"quality": 88} if given.out.suffix in (".jpg", ".jpeg") else {}
    sheet.save(given.out, **quality)
    given.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"Done: {given.out}")


if __name__ == "__main__":
    main()
