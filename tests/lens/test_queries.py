"""What each patch looks at, stored with a reading, against softmax(q k^T) written out."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from lens.test_chosen_tokens import Chooser, by_chance, largest
from vitreous import graft, look
from vitreous.base.errors import SettingError, UnknownName
from vitreous.layers.stream import Assignment
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.probes.token_groups import token_of_places
from vitreous.lens.query_rows import queries_note
from vitreous.lens.reading import read
from vitreous.lens.stored_maps import packed_rows
from vitreous.lens.tap import trace, watch

HEADS, WIDTH, SIDE, PITCH, LAYERS = 2, 8, 4, 4, 2


class ByHand(nn.Module):
    """A ViT of two attentions with a class token, written out with a softmax; keeps its maps (B, H, N, N) in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cls_token = nn.Conv2d(3, WIDTH, PITCH, PITCH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, SIDE * SIDE + 1, WIDTH))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        for p in self.parameters():
            p.data.mul_(2)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.embed(images).flatten(2).mT], 1) + self.places
        self.maps = []
        for projection in self.projections:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projection(x).chunk(3, -1))
            scores = torch.einsum("bhnk,bhmk->bhnm", q, k) / (WIDTH / HEADS) ** 0.5
            weights = scores.softmax(-1)
            self.maps.append(scores.detach().double().softmax(-1))
            x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x[:, 0]


def pixels(count: int, side: int = SIDE * PITCH) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from a folder"])
def test_a_query_is_the_softmax_of_its_row(tmp_path, saved):
    model, images = ByHand(), pixels(3)
    reading = look(model, images, batch_size=2, probes="queries")
    reading = read(reading.save(tmp_path / "reading")) if saved else reading
    model(images)
    assert reading.facts["queries"]["images"] == [0, 1, 2]
    assert reading.facts["queries"]["bytes"] == LAYERS * HEADS * SIDE**2 * (SIDE**2 + 4)
    for image in range(3):
        for layer in range(LAYERS):
            for row, column in ((0, 0), (2, 3)):
                exact = model.maps[layer][image, :, 1 + row * SIDE + column, 1:].reshape(HEADS, SIDE, SIDE).numpy()
                bound = exact.max(axis=(1, 2)) / 510 + 1e-6
                for head in range(HEADS):
                    stored = reading.query(image, layer, (row, column), head)
                    assert stored.shape == (SIDE, SIDE)
                    assert np.abs(stored - exact[head]).max() <= bound[head]
                assert np.abs(reading.query(image, layer, (row, column)) - exact.mean(0)).max() <= bound.mean()


def test_the_budget_says_for_how_many_images(tmp_path):
    one = LAYERS * HEADS * SIDE**2 * (SIDE**2 + 4)
    model, images = ByHand(), pixels(20)
    reading = look(model, images, batch_size=4, probes="queries", query_budget=18.5 * one / 1e6, out=tmp_path / "out")
    assert reading.facts["queries"]["images"] == list(range(18))  # of two parts
    assert [len(part.tensors["queries/1"]) for part in reading.parts] == [16, 2]
    assert "stored for 18 images" in queries_note(reading.facts["queries"])[0]
    with pytest.raises(SettingError, match=r"image 18.*larger query_budget"):
        reading.query(18, 0, (0, 0))
    with pytest.raises(SettingError, match=r"layer 7: there is no such layer"):
        reading.query(17, 7, (0, 0))
    with pytest.raises(SettingError, match=r"\(4, 0\), head -1"):
        reading.query(17, 0, (4, 0))
    small = look(model, images[:2], probes="queries", query_budget=0.9 * one / 1e6)
    assert small.facts["queries"]["images"] == []
    assert "not stored: one image takes" in queries_note(small.facts["queries"])[0]
    assert not [name for name in small.parts[0].tensors if name.startswith("queries")]


def test_without_a_budget_there_is_nothing(tmp_path):
    reading = look(ByHand(), pixels(2), query_budget=0)
    assert reading.facts["queries"]["images"] == []
    assert queries_note(reading.facts["queries"]) == []
    with pytest.raises(SettingError, match="Look again with a larger query_budget"):
        reading.query(0, 0, (0, 0))


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=3)


@pytest.mark.parametrize(
    "text", ["token_merging:tokens=4", "evit:keep=0.5,layers=1", "evit:keep=0.5,layers=1,fuse=false", "extra_tokens:after=1"]
)
def test_behind_merged_and_dropped_tokens_each_patch_has_the_row_of_its_token(text):
    model, images = small_vit().eval(), pixels(2, 64)
    graft(model, text)
    reading, rows = look(model, images, noise=0), []

    def keep(call) -> None:
        rows.append((call.map()[:, 0].double(), call.assignment, call.inserted))

    with torch.no_grad():
        watch(model, images, keep, layouts=trace(model, images))
    for layer, (maps, assignment, inserted) in enumerate(rows):
        for patch in range(16):
            for image in range(2):
                index = torch.arange(17) if assignment is None else assignment.index[image]
                token = int(index[1 + patch])
                exact = np.zeros(17)
                if token >= 0:
                    row = maps[image].mean(0)[token]
                    shared = {t: row[t] / int((index == t).sum()) for t in range(len(row) - inserted)}
                    exact = np.array([0 if index[p] < 0 else shared[int(index[p])] for p in range(17)])
                stored = reading.query(image, layer, divmod(patch, 4))
                assert np.abs(stored - exact[1:].reshape(4, 4)).max() <= maps.max() / 510 + 1e-6


@pytest.mark.parametrize("choose", [largest, by_chance])
def test_patches_that_a_model_chooses_have_their_rows_at_their_places(choose):
    model, images = Chooser(choose), pixels(3)
    reading = look(model, images, noise=0, probes=["queries", "token_groups"])
    assert reading.facts["queries"]["images"] == [0, 1, 2]
    for image, index in enumerate(model.index):  # of the last pass
        tokens = reading.tokens(0)[image].ravel()
        assert sorted(tokens[tokens >= 0]) == list(range(len(index)))
        np.testing.assert_array_equal(tokens[index], range(len(index)))
        for patch in range(SIDE**2):
            stored = reading.query(image, 0, divmod(patch, SIDE), 1)
            if patch not in index:
                assert np.isnan(stored).all()
                continue
            exact = np.zeros(SIDE**2)
            exact[index] = model.second.maps[image, 1, index.tolist().index(patch)]
            assert np.abs(stored.ravel() - exact).max() <= exact.max() / 510 + 1e-6


@pytest.mark.parametrize("text", ["token_merging:tokens=4", "evit:keep=0.5,layers=1", "evit:keep=0.5,layers=1,fuse=false"])
def test_which_patches_share_a_token(text):
    model, images = small_vit().eval(), pixels(2, 64)
    graft(model, text)
    reading, assignments = look(model, images, noise=0, probes="token_groups"), []
    with torch.no_grad():
        watch(model, images, lambda call: assignments.append(call.assignment), layouts=trace(model, images))
    assert assignments[0] is None
    with pytest.raises(UnknownName, match="layer with merged or dropped tokens"):
        reading.tokens(0)
    for layer, assignment in enumerate(assignments):
        if assignment is not None:
            np.testing.assert_array_equal(reading.tokens(layer).reshape(2, 16), assignment.index[:, 1:])
    assert any(assignment is not None for assignment in assignments)


def test_soft_assignments_show_the_token_that_a_patch_gives_most_to():
    weights = torch.tensor([[[1, 0, 0.2, 0, 0], [0, 1, 0.7, 0, 0.1]]])  # a class token and 2 x 2 patches
    cells = torch.tensor([[-1, 0, 1, 2, 3]])
    layout = Layout((2, 2), torch.zeros(1, 5, 2), torch.zeros(1, 5, 2), (2, 2), (2, 2), 1, 1, 1, cells=cells, key_cells=cells)
    assert token_of_places(Assignment(weights=weights), layout, 1).tolist() == [[[1, 1], [-1, 1]]]


def test_the_spectra_of_a_model_are_those_of_its_weights():
    model = small_vit().eval()
    graft(model, "svda:layers=1")
    with torch.no_grad():
        model.blocks[1].attn.sigma.copy_(torch.randn(3, 64))
    spectra = look(model, pixels(1, 64), probes="spectra", noise=0).spectra
    assert set(spectra) == {("learned", 1), ("weight", 0), ("weight", 1), ("weight", 2)}
    np.testing.assert_array_equal(spectra["learned", 1], model.blocks[1].attn.sigma.detach())
    qkv = model.blocks[0].attn.qkv
    affine = torch.cat([qkv.weight, qkv.bias[:, None]], 1).detach().double().unflatten(0, (3, 3, 64))
    for head in range(3):
        exact = np.linalg.svd((affine[0, head].mT @ affine[1, head]).numpy(), compute_uv=False)[:64]
        np.testing.assert_allclose(spectra["weight", 0][head], exact, rtol=1e-4, atol=1e-5)


def test_windows_are_said_to_have_none():
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1), num_heads=(1, 2),
                              embed_dim=16, num_classes=2).eval()  # fmt: skip
    reading = look(model, pixels(1, 56), probes="queries")
    assert reading.facts["queries"]["reasons"]["0"] == "it attends in windows"
    with pytest.raises(SettingError, match="layer 0: it attends in windows"):
        reading.query(0, 0, (0, 0))


def test_bytes_are_right_to_half_a_step():
    rows = np.random.default_rng(0).gamma(0.1, 1, (5, 3, 3)).astype(np.float32)
    rows[3], rows[4] = 0, np.nan
    values, scale = packed_rows(rows)
    assert np.isnan(scale[4])
    assert scale[3] == 0
    assert (np.abs(values * scale[:, None, None] - rows)[:4].max((1, 2)) <= rows[:4].max((1, 2)) / 510 * 1.0001).all()
