"""What each patch looks at, stored with a reading, against softmax(q k^T) written out."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from vitreous import graft, look
from vitreous.base.errors import SettingError
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
