"""How fast are the leading singular triples of a batch, at an angle no larger than the peer's?

    python benchmarks/spectral_speed/run.py            nine shapes, ranks 1, 4, 8, 16: about 6 minutes on two cores
    python benchmarks/spectral_speed/run.py --full     {8, 32, 128} x {50, 197, 577, 1025} x {192, 384, 768, 1024}: hours
    python benchmarks/spectral_speed/run.py --device cuda

ours    `leading_subspace(x, rank)` as it comes: 8 more columns, two power steps, with signs; its `info` is not asked for
peer    `torch.svd_lowrank(x, q=rank + 8, niter=2)`: as many columns and steps, so as many products with x
full    `torch.linalg.svd(x, full_matrices=False)`

Accuracy is the sine of the largest principal angle to the true spaces, the larger of left and right, on planted spectra:
fast exp(-(i-1)/4), 1/i, 1/sqrt(i); the mean over matrices and three sketches. Times do not depend on the spectrum; those here
are of noise. accuracy.md has the angles, roofline.md what the products with x would cost if reading x were all of it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vitreous.bench.timing import rounds
from vitreous.layers.spectral import leading_subspace

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

NINE = (
    (32, 50, 768),
    (32, 197, 192),
    (32, 197, 384),
    (32, 197, 768),
    (8, 197, 1024),
    (128, 197, 384),
    (8, 577, 768),
    (32, 577, 384),
    (8, 1025, 1024),
)
ALL = tuple(itertools.product((8, 32, 128), (50, 197, 577, 1025), (192, 384, 768, 1024)))
RANKS, EXTRA, POWER = (1, 4, 8, 16), 8, 2
SPECTRA = {"fast": lambda i: torch.exp(-(i - 1) / 4), "1/i": lambda i: 1 / i, "1/sqrt(i)": lambda i: i**-0.5}
SLOWER = (
    "The six products with x, of which the peer takes as many, are more than half of our time; what ours replaces, QR and SVD "
    "of the small sides, costs the peer little at low rank or few matrices."
)
PEER = "torch.svd_lowrank, at no larger an angle"
NARROW = "A full SVD grows with the cube of the smaller side, which is least here; our small operations do not shrink as fast."
SMALL = "Small operations are most of the time here: conditioning in float64, and signs, which the peer has not."


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(shape: tuple[int, int, int], spectrum: str) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, D) float32 with the singular values of a spectrum, and its left and right vectors, float64."""
    b, n, d = shape
    m = min(n, d)
    u, v = (torch.linalg.qr(noise(b, side, m, seed=side, dtype=torch.float64)).Q for side in (n, d))
    s = SPECTRA[spectrum](torch.arange(1, m + 1, dtype=torch.float64))
    return ((u * s) @ v.mT).float(), u, v


def sine(found: Tensor, true: Tensor) -> Tensor:
    """Of the largest principal angle between the columns of found and true, (B,)."""
    q = torch.linalg.qr(found.double().cpu()).Q
    return torch.linalg.matrix_norm(true - q @ (q.mT @ true), 2)


def peer(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.svd_lowrank(x, q=min(rank + EXTRA, *x.shape[1:]), niter=POWER)


def angles(shape: tuple[int, int, int], rank: int, device: str) -> dict[str, tuple[float, float]]:
    """{spectrum: (ours, peer)}, means over at most four matrices and three sketches."""
    found = {}
    for spectrum in SPECTRA:
        x, u, v = planted((min(shape[0], 4), *shape[1:]), spectrum)
        x, u, v = x.to(device), u[:, :, :rank], v[:, :, :rank]
        both: dict[str, list[Tensor]] = {"ours": [], "peer": []}
        for seed in range(3):
            sketch = noise(shape[2], min(rank + EXTRA, *shape[1:]), seed=seed)
            ours = leading_subspace(x, rank, method="cholesky_qr", sketch=sketch)
            both["ours"].append(torch.maximum(sine(ours.U, u), sine(ours.V, v)))
            torch.manual_seed(seed)
            left, _, right = peer(x, rank)
            both["peer"].append(torch.maximum(sine(left[:, :, :rank], u), sine(right[:, :, :rank], v)))
        found[spectrum] = tuple(float(f"{torch.cat(values).mean():.3g}") for values in both.values())
    return found


def against(base: Callable[[Tensor], object], shape: tuple[int, int, int], rank: int, device: str) -> dict[str, Callable]:
    x = noise(*shape).to(device)
    return {"ours": lambda: leading_subspace(x, rank), "peer": lambda: base(x)}


def learning(shape: tuple[int, int, int], rank: int, device: str) -> dict[str, Callable]:
    """Forward and backward of T = U^T x through the decomposition."""
    x = noise(*shape).to(device).requires_grad_()

    def back(u: Tensor) -> None:
        torch.autograd.grad((u.mT @ x).square().sum(), x)

    return {
        "ours": lambda: back(leading_subspace(x, rank, gradient="through").U),
        "peer": lambda: back(peer(x, rank)[0][:, :, :rank]),
    }


def deficient(shape: tuple[int, int, int], rank: int, device: str) -> dict[str, Callable]:
    b, n, d = shape
    poor, rich = (noise(b, n, 2) @ noise(b, 2, d, seed=1)).to(device), noise(*shape).to(device)
    return {"rank 2": lambda: leading_subspace(poor, rank), "full rank": lambda: leading_subspace(rich, rank)}


def floor(shape: tuple[int, int, int], device: str) -> float:
    """Seconds to read x once: the median of a sum over it."""
    x = noise(*shape).to(device)
    return statistics.median(rounds({"read": x.sum}, 30, device=device)["read"])


def main() -> None:
    options = arguments(__doc__, full={"action": "store_true"}, rounds={"type": int, "default": 40})
    results = Results(HERE, options, part="full" if options.full else "result")
    shapes, device = ALL if options.full else NINE, options.device
    for shape in shapes:
        words = " x ".join(map(str, shape))
        for rank in RANKS:
            cell, long = f"{words}, rank {rank}", shape[1] >= 197
            low = partial(against, partial(peer, rank=rank), shape, rank, device)
            claim = PEER if long else f"{PEER}, 50 tokens"
            asked = {"limit": 1.0, "goal": "at least", "reason": SLOWER if long else SMALL}
            row = results.row(claim, cell, low, count=options.rounds, **asked)
            if "angles" not in row["more"]:
                row["more"]["angles"] = angles(shape, rank, device)
                results.write()
        if shape[1] >= 197:
            svd = partial(against, partial(torch.linalg.svd, full_matrices=False), shape, 8, device)
            asked = {"limit": 20.0, "goal": "at least", "reason": NARROW}
            results.row("torch.linalg.svd", f"{words}, rank 8", svd, count=16, warmup=1, **asked)
        back = partial(learning, shape, 8, device)
        results.row("Forward and backward, torch.svd_lowrank", f"{words}, rank 8", back, count=16, goal="at least", warmup=1)
        poor = partial(deficient, shape, 8, device)
        row = results.row("Rank-deficient input", f"{words}, rank 8", poor, count=20, limit=2.0)
        row["more"].setdefault("floor", float(f"{floor(shape, device):.3g}"))
    results.mean(PEER, limit=2.0, reason=SLOWER)
    results.note(PEER, f"{larger(results.rows)} (accuracy.md)")
    if device == "cpu":
        (HERE / "accuracy.md").write_text(accuracy(results.rows))
        (HERE / "roofline.md").write_text(roofline(results.rows))


def accuracy(rows: list[dict]) -> str:
    lines = ["Sine of the largest principal angle: ours / peer, means over matrices and three sketches.", ""]
    lines += [f"| shape and rank | {' | '.join(SPECTRA)} |", "|---|" + "---|" * len(SPECTRA)]
    for row in rows:
        if found := row["more"].get("angles"):
            lines.append(f"| {row['cell']} | " + " | ".join(f"{a:.2g} / {b:.2g}" for a, b in found.values()) + " |")
    return "\n".join([*lines, "", larger(rows)]) + "\n"


def larger(rows: list[dict]) -> str:
    """In how many shapes, ranks and spectra our angle is the larger, and where."""
    found = {(row["cell"], name): pair for row in rows for name, pair in row["more"].get("angles", {}).items()}
    worse = [f"{cell}, {name}: {a:.2g} / {b:.2g}" for (cell, name), (a, b) in found.items() if a > b]
    where = ": " + "; ".join(worse) if worse else ""
    return f"The largest principal angle of ours is the larger in {len(worse)} of {len(found)}{where}."


def roofline(rows: list[dict]) -> str:
    """Per shape and rank: time, and how it compares with reading x once per product (2 power + 2 of them)."""
    passes = 2 * POWER + 2
    lines = [f"`read` is one sum over x. The floor is {passes} of them, one per product with x; columns are of the floor.", ""]
    lines += ["| shape and rank | read, ms | ours / floor | peer / floor |", "|---|---|---|---|"]
    floors = {row["cell"].split(",")[0]: row["more"]["floor"] for row in rows if "floor" in row["more"]}
    for row in rows:
        if "angles" in row["more"]:
            read = floors[row["cell"].split(",")[0]]
            ours, base = (statistics.median(row["seconds"][name]) / (passes * read) for name in ("ours", "peer"))
            lines.append(f"| {row['cell']} | {1000 * read:.3g} | {ours:.1f} | {base:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
