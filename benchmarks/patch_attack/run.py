"""Does a temperature in the attention protect the real ViT-Tiny/16 from adversarial patches, and what does it cost?

    python benchmarks/patch_attack/run.py ../shared/data

2 x 2 patches of 16 x 16 pixels, where the loss has the largest gradient at T = 1, get 6 steps of 0.25 of the gradient's sign.
At every temperature: the accuracy on 128 photographs as they are; the fooling rate, among the attacked ones that are right
before, of a patch made for that very model (adaptive) and of the patch made at T = 1 (transferred); of Gaussian noise of
severity 5 in the same patch, drawn by three seeds; and the share of the rollout that is on the patch, before and after. What is
done already is in result.json, and is not done again.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import torch

from vitreous.base.statistics import bootstrap, wilson
from vitreous.lens.patch_attack import Perturbation, Scale, corners_of, generator, logits_of, patch_pixels, salience_of
from vitreous.lens.probe import BatchInfo
from vitreous.lens.probes.patch_perturbation import rollout, share_inside, tempered
from vitreous.lens.tap import Layouts, trace

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

TEMPERATURES, PHOTOGRAPHS, ATTACKED, BATCH, SEEDS = ("1", "1.2", "1.5", "2", "3"), 128, 48, 16, (0, 1, 2)
GRID, SIZE, SIDE, SCALE = (14, 14), (224, 224), 2, Scale((0.5,) * 3, (0.5,) * 3)
ATTACK = Perturbation(steps=6, step=0.25)


def labels_of(data: Path, count: int) -> list[int]:
    """Classes of the photographs, which are the names of their files."""
    with tarfile.open(data / "imagenet1k-samples" / "imagenet_500_224px.tar") as tar:
        names = [member.name for member in tar if member.name.endswith(".jpg")]
    return [int(Path(name).stem) for name in names[:count]]


def classes(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits_of(model, part).argmax(1) for part in images.split(50)])


def mass(model: torch.nn.Module, images: torch.Tensor, where: torch.Tensor, layouts: Layouts) -> list[float]:
    """Share of the rollout that is on the patch."""
    maps = rollout(model, BatchInfo(images, len(images), layouts))
    return [round(value, 5) for value in share_inside(maps, where).tolist()]


def first_attack(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the patches are, and the images attacked at T = 1."""
    own = classes(model, images)
    salience = salience_of(model, images, own, GRID)
    corners = corners_of("salient", SIDE, GRID, salience, [generator(0, i) for i in range(len(images))])
    where = patch_pixels(corners, SIDE, GRID, SIZE)
    return where, ATTACK(model, images, own, where, SCALE)


def readings(model, layouts, images, truth, where, transferred, adaptive, first) -> dict[str, list]:
    """What a model answers to a batch, and where its rollout is."""
    noisy = [Perturbation("noise", 5, seed=seed)(model, images, truth, where, SCALE, first) for seed in SEEDS]
    return {
        "adaptive": classes(model, adaptive).tolist(),
        "transferred": classes(model, transferred).tolist(),
        "noise": [classes(model, each).tolist() for each in noisy],
        "mass_before": mass(model, images, where, layouts),
        "mass_adaptive": mass(model, adaptive, where, layouts),
        "mass_noise": mass(model, noisy[0], where, layouts),
    }


@torch.no_grad()
def main(data: Path) -> None:
    torch.set_num_threads(1)
    model, file = vit_tiny(data).requires_grad_(False), HERE / "result.json"
    images, labels = photographs(data, PHOTOGRAPHS), labels_of(data, PHOTOGRAPHS)
    result = json.loads(file.read_text()) if file.exists() else {"arms": {value: {"parts": {}} for value in TEMPERATURES}}
    result |= {"command": "python benchmarks/patch_attack/run.py ../shared/data", "labels": labels, "attacked": ATTACKED}
    for value, arm in result["arms"].items():
        if "clean" not in arm:
            with tempered(model, float(value)):
                arm["clean"] = classes(model, images).tolist()
            write(file, result)
    layouts = trace(model, images[:1])
    for first in range(0, ATTACKED, BATCH):
        missing = [value for value in TEMPERATURES if str(first) not in result["arms"][value]["parts"]]
        if not missing:
            continue
        batch, truth = images[first : first + BATCH], torch.tensor(labels[first : first + BATCH])
        where, transferred = first_attack(model, batch)
        for value in missing:
            with tempered(model, float(value)):
                right = (classes(model, batch) == truth).nonzero()[:, 0]
                adaptive = transferred.clone()
                if value != "1" and len(right):
                    adaptive[right] = ATTACK(model, batch[right], truth[right], where[right], SCALE)
                part = readings(model, layouts, batch, truth, where, transferred, adaptive, first)
            result["arms"][value]["parts"][str(first)] = part
            write(file, result)
            print(first, value, flush=True)
        (HERE / "table.md").write_text(table(result))


def rate(flips: list[bool]) -> str:
    if not flips:
        return "none is right"
    low, high = wilson(sum(flips), len(flips))
    return f"{sum(flips) / len(flips):.3f} [{low:.3f}, {high:.3f}]"


def table(result: dict) -> str:
    """Of the batches that are there at every temperature."""
    labels, arms = result["labels"], result["arms"]
    firsts = sorted(set.intersection(*(set(arm["parts"]) for arm in arms.values())), key=int)
    count = sum(len(next(iter(arms.values()))["parts"][first]["adaptive"]) for first in firsts)
    lines = [
        f"Accuracy on {len(labels)} photographs; fooling rates among those of the first {count} that the model is right about "
        "without a patch; 95 % intervals over images (Wilson's).",
        "",
        "| T | accuracy | right of the attacked | adaptive | transferred | noise, three seeds |",
        "|---|---|---|---|---|---|",
    ]
    pairs = [
        "",
        "Fooled less often than at T = 1? Images that both are right about; 95 % bootstrap intervals.",
        "",
    ]
    pairs += ["| T | images | adaptive, difference | transferred, difference |", "|---|---|---|---|"]
    masses = [
        "",
        "Share of the rollout on the patches, 0.0204 if even: mean over the images that are right, 95 % bootstrap.",
    ]
    masses += ["", "| T | before | adversarial (adaptive) | noise |", "|---|---|---|---|"]
    base: dict[int, bool] = {}
    for value, arm in arms.items():
        joined = {
            name: [answer for first in firsts for answer in arm["parts"][first][name]]
            for name in ("adaptive", "transferred", "mass_before", "mass_adaptive", "mass_noise")
        }
        noise = [[answer for first in firsts for answer in arm["parts"][first]["noise"][seed]] for seed in range(len(SEEDS))]
        correct = [answer == label for answer, label in zip(arm["clean"], labels, strict=True)]
        right = [i for i in range(count) if correct[i]]
        flips = {name: {i: joined[name][i] != labels[i] for i in right} for name in ("adaptive", "transferred")}
        base = base or flips["adaptive"]
        noisy = [f"{sum(one[i] != labels[i] for i in right) / len(right):.3f}" for one in noise] if right else []
        lines.append(
            f"| {value} | {rate(correct)} | {len(right)} of {count} | {rate(list(flips['adaptive'].values()))} | "
            f"{rate(list(flips['transferred'].values()))} | {', '.join(noisy)} |"
        )
        both = [i for i in right if i in base]
        if value != "1" and both:
            differences = [bootstrap([float(one[i]) - float(base[i]) for i in both]) for one in flips.values()]
            cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*each) for each in differences]
            pairs.append(f"| {value} | {len(both)} | {' | '.join(cells)} |")
        if right:
            shares = [bootstrap([joined[f"mass_{name}"][i] for i in right]) for name in ("before", "adaptive", "noise")]
            masses.append(f"| {value} | " + " | ".join("{:.4f} [{:.4f}, {:.4f}]".format(*each) for each in shares) + " |")
    return "\n".join([*lines, *pairs, *masses]) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
