"""House rules that a reader cannot keep in mind: decompositions live in one file, and imports go one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "vitreous"
FILES = sorted(SRC.rglob("*.py"))
HOME = Path("layers/spectral.py")

# --- one home for decompositions --------------------------------------------------------------------------------------

LINALG = ("torch.linalg", "numpy.linalg", "scipy.linalg", "scipy.sparse.linalg")
# fmt: off
DECOMPOSITIONS = {
    "svd", "svdvals", "svds", "eig", "eigh", "eigs", "eigsh", "eigvals", "eigvalsh", "qr", "rq", "cholesky",
    "cholesky_ex", "cho_factor", "lstsq", "pinv", "pinvh", "matrix_rank", "cond", "orth", "null_space", "polar",
    "schur", "lobpcg",
}
TORCH = {
    "svd", "qr", "eig", "symeig", "cholesky", "geqrf", "lstsq", "pinverse", "pca_lowrank", "svd_lowrank", "lobpcg",
    "matrix_rank", "nuclear_norm",
}
# fmt: on
METHODS = {"svd", "qr", "eig", "symeig", "cholesky", "geqrf", "lstsq", "pinverse"}
NORMS = {f"{package}.{name}" for package in LINALG for name in ("norm", "matrix_norm")} | {"torch.norm"}
FORBIDDEN = (
    {f"{package}.{name}" for package in LINALG for name in DECOMPOSITIONS}
    | {f"torch.{name}" for name in TORCH}
    | {"torch.nn.init.orthogonal_", "torch.nn.utils.parametrizations.orthogonal"}
)


def decompositions(source: str) -> list[tuple[int, str]]:
    """(line, name) of every decomposition of torch, numpy or scipy that a source text names."""
    tree, aliases, found = ast.parse(source), {}, []

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return aliases.get(node.id)
        if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
            return f"{base}.{node.attr}"
        return None

    for node in ast.walk(tree):  # what each name stands for, wherever it was imported or assigned
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.names[0].name == "*" and node.module in LINALG:
                found.append((node.lineno, f"{node.module}.*"))
            aliases.update({name.asname or name.name: f"{node.module}.{name.name}" for name in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (name := dotted(node.value)):
            aliases.setdefault(node.targets[0].id, name)

    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Name | ast.Attribute) else None
        if name in FORBIDDEN:
            found.append((node.lineno, name))
        if isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f) for n in node.names if (f := f"{node.module}.{n.name}") in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        name, order = dotted(node.func), [k.value for k in node.keywords if k.arg in ("ord", "p")] + node.args[1:2]
        method = node.func.attr if isinstance(node.func, ast.Attribute) and name is None else None
        if method in METHODS:
            found.append((node.lineno, f".{method}"))
        if method == "norm" and any(isinstance(a, ast.Constant) and a.value == "nuc" for a in node.args[:1] + order):
            found.append((node.lineno, ".norm('nuc')"))
        if name in NORMS and any(ast.unparse(o) in ("2", "2.0", "-2", "-2.0", "'nuc'") for o in order):
            found.append((node.lineno, f"{name}({ast.unparse(order[0])})"))
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            name = f"{dotted(node.args[0])}.{node.args[1].value}"
            found += [(node.lineno, name)] if name in FORBIDDEN else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.linalg.svd(x)",
        "import torch as t; t.linalg.eigvalsh(x)",
        "import torch.linalg as la; la.cholesky_ex(x)",
        "import torch.linalg; torch.linalg.cond(x)",
        "from torch import linalg; linalg.pinv(x)",
        "from torch.linalg import svdvals as values; values(x)",
        "from torch.linalg import *; qr(x)",
        "from torch import svd_lowrank",
        "import torch; la = torch.linalg; la.lstsq(a, b)",
        "import torch; list(map(torch.linalg.matrix_rank, xs))",
        "import torch; getattr(torch.linalg, 'eigh')(x)",
        "import torch; torch.linalg.matrix_norm(x, 2)",
        "import torch; torch.linalg.matrix_norm(x, ord=-2)",
        "import torch; torch.linalg.norm(x, ord='nuc')",
        "import torch; torch.norm(x, p='nuc')",
        "import torch; torch.pca_lowrank(x)",
        "import torch; torch.lobpcg(x)",
        "from torch import nn; nn.init.orthogonal_(w)",
        "u, s, v = x.svd()",
        "q = (x @ y).qr()[0]",
        "x.mT.pinverse()",
        "x.norm('nuc')",
        "import numpy as np; np.linalg.qr(x)",
        "from numpy.linalg import norm; norm(x, 2)",
        "import scipy.linalg; scipy.linalg.null_space(x)",
        "from scipy import linalg as sl; sl.eigh(x)",
        "def f(x):\n    from scipy.sparse.linalg import svds\n    return svds(x)",
    ],
)
def test_the_checker_finds_a_planted_decomposition(line):
    assert decompositions(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.linalg.vector_norm(x, 2, dim=-1)",
        "import torch; torch.linalg.matrix_norm(x)",
        "import torch; torch.linalg.norm(x, ord='fro')",
        "x.norm(2)",
        "from vitreous.layers.spectral import product_svd; product_svd(a, b)",
        "svd = 'a name'; basis = {'svd': svd}",
    ],
)
def test_the_checker_leaves_other_algebra_alone(line):
    assert decompositions(line) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_decompositions_live_in_one_file(path):
    found = decompositions(path.read_text())
    if path.relative_to(SRC) == HOME:
        assert found
    else:
        assert found == [], f"use {HOME}, or add what is missing there"


# --- imports go one way -----------------------------------------------------------------------------------------------

LOWER = {"errors", "files", "team", "layers", "slots", "mechanism"}
JOBS = LOWER | {"grafting", "mechanisms", "architectures", "lens", "data", "__version__"}
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "team": {"errors"},
    "data": {"errors"},
    "report": {"errors", "files"},
    "layers": {"errors"},
    "slots": {"errors", "layers"},
    "mechanism": LOWER,
    "grafting": LOWER,
    "mechanisms": LOWER,
    "architectures": LOWER,
    "lens": LOWER | {"grafting", "mechanisms", "architectures", "data"},
    "train": JOBS,
    "bench": JOBS | {"train", "report"},
    "compress": JOBS,
    "demo": JOBS | {"train", "looking", "report"},
    "looking": JOBS | {"train", "report"},
    "checking": JOBS,
    "shipping": JOBS | {"train"},
    "__main__": {"cli"},
    "cli": JOBS | {"train", "bench", "compress", "demo", "checking", "looking", "shipping", "report", "vitreous"},
}


def imported(source: str, path: Path) -> set[str]:
    """What a source text imports of `vitreous`, without that prefix; path (relative to the package) resolves dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("vitreous", *path.parts[: len(path.parts) - node.level]) if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {f"{base}.{name.name}" for name in node.names}
    return {name.removeprefix("vitreous.") for name in names if name.split(".")[0] == "vitreous"}


def wrong_imports(source: str, path: Path) -> set[str]:
    """The imports of a file that go against the direction of the house."""
    part = path.parts[0].removesuffix(".py")
    if part.startswith("__"):  # the package's own __init__ and __main__ see everything
        return set()
    own = set() if part == "mechanisms" else {part}
    return {name for name in imported(source, path) if name.split(".")[0] not in MAY_IMPORT[part] | own}


@pytest.mark.parametrize(
    ("path", "line", "wrong"),
    [
        ("layers/a.py", "from vitreous.mechanisms import attn", True),
        ("layers/a.py", "from ..slots import get", True),
        ("layers/a.py", "from .tokens import restore", False),
        ("mechanisms/attn/a.py", "from vitreous.mechanisms.tokens.spc import SPC", True),
        ("mechanisms/attn/a.py", "from . import b", True),
        ("mechanisms/attn/a.py", "from vitreous.grafting import graft", True),
        ("mechanisms/attn/a.py", "from vitreous import slots", False),
        ("data/a.py", "def f():\n    import vitreous.layers.spectral", True),
        ("data/a.py", "from vitreous.errors import DataError", False),
        ("lens/a.py", "from vitreous.train import loop", True),
        ("lens/a.py", "import vitreous", True),
        ("cli.py", "from vitreous.train import loop", False),
    ],
)
def test_the_direction_is_checked(path, line, wrong):
    assert bool(wrong_imports(line, Path(path))) == wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_one_way(path):
    assert wrong_imports(path.read_text(), path.relative_to(SRC)) == set()
