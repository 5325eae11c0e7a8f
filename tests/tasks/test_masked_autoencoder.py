"""Masked autoencoder: transformers' own, the loss as loops, what is hidden, kNN by hand, and a loss that falls."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from vitreous import graft, load
from vitreous.base.errors import HostError, SettingError
from vitreous.commands.cli import main
from vitreous.tasks import Dice
from vitreous.tasks._features import neighbour_accuracy
from vitreous.tasks.masked_autoencoder import Decoder, MaskedAutoencoder, patches_of, positions, visible
from vitreous.train.records.run_folder import read_metrics, read_table

SMALL = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 3}
TASK = {"width": 32, "depth": 2, "heads": 4}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL | options)


def objective(model=None, **options):
    torch.manual_seed(1)
    return MaskedAutoencoder(**TASK | options).build(vit() if model is None else model, None)


def pictures(count, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def dice(count):
    return Dice((3,), count, np.arange(count), torch.device("cpu"))


def transformers_twin(normalised):
    """transformers' model, and ours with its weights."""
    torch.manual_seed(2)
    config = ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=128,
        mask_ratio=0.75, norm_pix_loss=normalised, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.2) if p.requires_grad else None
        # transformers 5.23.0 leaves the fixed positions of a model that is made from a configuration at 0.
        for table in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
            rows = build_2d_sinusoidal_position_embedding(4, 4, table.shape[-1], dtype=torch.float64).chunk(2, 1)
            table[0, 1:] = torch.cat([rows[1], rows[0]], 1)  # rows first in the function, columns in weights
    ours = objective(vit(num_classes=0), normalised=normalised).double().eval()
    state, vit_state = dict(theirs.state_dict()), {}

    def block(source, goal):
        parts = [state.pop(f"{source}.attention.{name}_proj.weight") for name in "qkv"]
        biases = [state.pop(f"{source}.attention.{name}_proj.bias") for name in "qkv"]
        vit_state[f"{goal}.attn.qkv.weight"], vit_state[f"{goal}.attn.qkv.bias"] = torch.cat(parts), torch.cat(biases)
        pairs = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
        for theirs_, ours_ in (pairs | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            for kind in ("weight", "bias"):
                vit_state[f"{goal}.{ours_}.{kind}"] = state.pop(f"{source}.{theirs_}.{kind}")

    for i in range(2):
        block(f"vit.layers.{i}", f"model.blocks.{i}")
        block(f"decoder.decoder_layers.{i}", f"decoder.blocks.{i}")
    decoder_positions = state.pop("decoder.decoder_pos_embed")[0, 1:]
    torch.testing.assert_close(positions((4, 4), 32), decoder_positions, atol=1e-12, rtol=0)
    names = {
        "vit.embeddings.cls_token": "model.cls_token", "vit.embeddings.position_embeddings": "model.pos_embed",
        "vit.embeddings.patch_embeddings.projection.weight": "model.patch_embed.proj.weight",
        "vit.embeddings.patch_embeddings.projection.bias": "model.patch_embed.proj.bias",
        "vit.layernorm.weight": "model.norm.weight", "vit.layernorm.bias": "model.norm.bias",
        "decoder.mask_token": "decoder.mask_token",
    }  # fmt: skip
    for name in ("embed", "norm", "pred"):
        for kind in ("weight", "bias"):
            names[f"decoder.decoder_{name}.{kind}"] = f"decoder.{name}.{kind}"
    for source, goal in names.items():
        vit_state[goal] = state.pop(source)
    assert not state
    vit_state["decoder.mask_token"] = vit_state["decoder.mask_token"].flatten()
    ours.load_state_dict(vit_state)
    return theirs, ours


@pytest.mark.parametrize("normalised", [False, True])
def test_equals_the_masked_autoencoder_of_transformers(normalised):
    theirs, ours = transformers_twin(normalised)
    images, noise = pictures(3).double(), torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, keep = theirs(images, noise=noise), ours.chosen(noise)
        painted = ours.painted(images, keep)
        torch.testing.assert_close(painted, expected.logits, atol=1e-10, rtol=1e-10)
        assert ours.errors(images, keep).mean().item() == pytest.approx(expected.loss.item(), rel=1e-6)
        hidden = torch.ones(3, 16).scatter(1, keep, 0)
        assert torch.equal(hidden, expected.mask.to(hidden))
        ours.model.blocks[1].mlp.fc2.weight.zero_()
        ours.model.blocks[1].mlp.fc2.bias.zero_()
        assert (ours.painted(images, keep) - painted).abs().max() > 1e-3
        ours.decoder.mask_token.zero_()
        assert (ours.painted(images, keep) - painted).abs().max() > 1e-3


def test_the_loss_is_the_error_over_hidden_patches_alone():
    trained, images = objective(normalised=False).eval(), pictures(3)
    batch = trained.draw(images, torch.empty(3, 0), dice(3))
    assert batch["keep"].shape == (3, 4)
    painted, target, total = trained.painted(images, batch["keep"]), patches_of(images, (4, 4)), []
    for b in range(3):
        for n in set(range(16)) - set(batch["keep"][b].tolist()):
            total.append(sum((painted[b, n, i] - target[b, n, i]).item() ** 2 for i in range(48)) / 48)
    assert len(total) == 36
    assert trained.losses(batch, 0.0)["masked_autoencoder"].item() == pytest.approx(sum(total) / 36, rel=1e-5)


def test_hidden_pixels_do_not_reach_the_network():
    trained, images = objective().eval(), pictures(2)
    keep = trained.draw(images, torch.empty(2, 0), dice(2))["keep"]
    pixels = torch.zeros(2, 16, dtype=torch.bool).scatter(1, keep, True).view(2, 1, 4, 4)
    seen = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    others = torch.where(seen, images, torch.full_like(images, 9.0))
    with torch.no_grad():
        assert torch.equal(trained.painted(images, keep), trained.painted(others, keep))
        moved = torch.where(seen, images + 1, images)
        assert (trained.painted(images, keep) - trained.painted(moved, keep)).abs().max() > 1e-3


def test_patches_are_row_by_row_with_channels_last():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = patches_of(images, (4, 4))
    assert patches.shape == (2, 6, 48)
    for y, x, c in ((5, 10, 2), (0, 0, 0), (3, 7, 1)):
        assert patches[1, (y // 4) * 3 + x // 4, ((y % 4) * 4 + x % 4) * 3 + c] == images[1, c, y, x]


@pytest.mark.parametrize(("patches", "hide", "seen"), [(196, 0.75, 49), (196, 0.9, 19), (100, 0.9, 10), (16, 0.75, 4)])
def test_how_many_are_seen(patches, hide, seen):
    assert visible(patches, hide) == seen


def test_published_counts():
    """Pre-training models of medical MAE: ViT-S with 2 decoder blocks 28.49 M, with 8 47.40 M; theirs count no positions."""
    with torch.device("meta"):
        encoder = timm.create_model("vit_small_patch16_224", num_classes=0)
        for depth, count in ((2, 28.49), (8, 47.40)):
            decoder = Decoder(384, MaskedAutoencoder(depth=depth), 768, True)
            total = sum(p.numel() for module in (encoder, decoder) for p in module.parameters()) - encoder.pos_embed.numel()
            assert round(total / 1e6, 2) == count


def test_neighbours_vote():
    rows = torch.tensor([[1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [-0.2, 1]]).repeat_interleave(2, 0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1]).repeat_interleave(2)
    assert neighbour_accuracy(rows, labels, 3) == {"knn": 1.0}
    assert neighbour_accuracy(rows, labels[torch.randperm(12, generator=torch.Generator().manual_seed(0))], 3)["knn"] < 1
    one = torch.tensor([[1, 0.0], [1, 0.1], [0, 1], [0.3, 1]])
    assert neighbour_accuracy(one, torch.tensor([0, 1, 1, 1]), 1)["knn"] == pytest.approx(0.5)
    assert neighbour_accuracy(rows, torch.empty(12, 0)) == {}


def test_steps_on_one_batch_lower_the_loss():
    trained, images = objective().train(), pictures(8)
    batch = trained.draw(images, torch.empty(8, 0), dice(8))
    optimizer, losses = torch.optim.Adam(trained.parameters(), lr=2e-3), []
    for _ in range(40):
        losses.append(trained.losses(batch, 0.0)["masked_autoencoder"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_a_test_hides_the_same_of_an_image_whatever_its_mates():
    trained, images = objective().eval(), pictures(5)
    with torch.no_grad():
        whole = trained.predict({"images": images, "target": torch.arange(5)})
        alone = trained.predict({"images": images[3:4], "target": torch.arange(1)})
    torch.testing.assert_close(whole["loss"][3:4], alone["loss"], atol=1e-6, rtol=1e-6)
    assert trained.score(whole).keys() == {"loss", "knn"}


@pytest.mark.parametrize("text", ["svda", "token_merging:tokens=1", "extra_tokens:kind=register", "spc:after=1"])
def test_grafts_learn_with_it(text):
    trained, images = objective(graft(vit(), text)).train(), pictures(4)
    batch = trained.draw(images, torch.empty(4, 0), dice(4))
    trained.losses(batch, 0.0)["masked_autoencoder"].backward()
    without = {name for name, p in trained.named_parameters() if p.grad is None}
    assert not [name for name in without if "blocks" in name or "decoder" in name]


def test_neighbours_are_few_beside_the_images_of_a_class():
    """Among all others an image's own class is the rarest: a perfect space would have an accuracy of 0."""
    rows = torch.eye(3).repeat_interleave(4, 0)
    assert neighbour_accuracy(rows, torch.arange(3).repeat_interleave(4)) == {"knn": 1.0}


@pytest.mark.parametrize("folder", ["flat", "one/deep", "parts"])
def test_learns_from_pictures_without_labels(tmp_path, folder, capsys):
    """A folder as photographs lie there; the model that comes out has no classifier, and says so."""
    random = np.random.default_rng(0)
    for i in range(12):
        place = tmp_path / "photos" / (folder if folder != "parts" else ("train" if i < 9 else "val"))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    small = (
        "--model-kwargs patch_size=4 depth=1 embed_dim=24 num_heads=3 --image-size 16 --batch-size 4 --epochs 1 --device cpu"
    )
    run = tmp_path / "run"
    words = f"train {tmp_path / 'photos'} {small} --task masked_autoencoder:width=16,depth=1,heads=2 --out {run}"
    assert main(words.split()) == 0
    assert load(run).num_classes == 0
    metrics = read_metrics(run)[-1]
    assert metrics["tests"]["test"].keys() == {"loss"}
    assert "Labels: none are read" in (run / "summary.md").read_text()
    assert "classes.csv" not in (run / "summary.md").read_text()
    assert len(read_table(run / "predictions.csv")) == (3 if folder == "parts" else 2)
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "photos"), "--out", str(tmp_path / "p.csv")]) == 2
    assert "without a classifier" in capsys.readouterr().err


def test_labels_stay_needed_by_tasks_that_learn_them(tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(tmp_path / f"{i}.png")
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "outside any class folder" in capsys.readouterr().err


def test_bad_input():
    for hide in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(SettingError, match=r"^Found hide=.*above 0 and below 1"):
            MaskedAutoencoder(hide=hide)
    with pytest.raises(SettingError, match=r"^Found width=30"):
        MaskedAutoencoder(width=30, heads=4)
    with pytest.raises(SettingError, match=r"of which 0 would be seen"):
        objective(hide=0.99)
    with pytest.raises(HostError, match="ResNet"):
        MaskedAutoencoder().build(timm.create_model("test_resnet"), None)


@pytest.mark.parametrize("text", ["channelvit", "tokens_to_token", "ci2p"])
def test_tokens_that_are_no_patches_are_refused(text):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=24, num_heads=3)
    with pytest.raises(HostError, match=r"^patch_embed holds .*not one to one"):
        objective(graft(model, text))


@pytest.mark.parametrize("text", ["spectral_gate:layers=0", "class_query", "evit:fuse=false,keep=0.5,layers=1"])
def test_grafts_that_lose_visible_patches_are_refused(text):
    model = graft(vit(), text)
    modes = [module.training for module in model.modules()]
    with pytest.raises(HostError, match=r"^The network cannot be run on some of its patches"):
        objective(model)
    assert [module.training for module in model.modules()] == modes
