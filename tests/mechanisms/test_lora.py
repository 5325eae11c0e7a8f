"""LoRA against its formula as loops, its published counts, what reads weights, and the weights it folds into."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from contract.hosts import build, images
from vitreous import LoRA, calibrate, check, fold, graft, grafts, look, new_parameters, parse, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.hosts.attention import query_key_weights
from vitreous.layers.linear import affine
from vitreous.lens.formulas import spectra
from vitreous.mechanisms.linear.lora import LoRALinear, adapted, spread

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
EVERY = ("qkv", "proj", "fc1", "fc2")


def vit(**more):
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL | more)
    with torch.no_grad():  # as they start, the blocks and the classifier do next to nothing
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def random(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def learned(model, size=0.5):
    """Every B away from its start, the same at every call; 0 closes them."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(new_parameters(model).items()):
            if name.endswith("lora_B"):
                parameter.copy_(size * random(*parameter.shape, seed=i))
    return model


def layer(places=(True, False, True), **settings):
    generator = torch.Generator().manual_seed(0)
    new = adapted(nn.Linear(6, 12).double(), places, LoRA(**{"rank": 2, "alpha": 3.0} | settings), generator).double()
    new.lora_B.data = random(*new.lora_B.shape)
    return new.eval()


@pytest.mark.parametrize("places", [(True,), (True, False, True), (False, True), (True, True, True)])
def test_output_is_the_papers_formula(places):
    """y = W x + b + (alpha / r) B A x by loops, with a pair (A, B) of its own for every chosen part of the output."""
    lora, x, rank = layer(places), random(3, 6, seed=2), 2
    size, part = 12 // len(places), -1
    a, b = lora.lora_A.tolist(), lora.lora_B.tolist()
    for index, place in enumerate(places):
        part += place
        for n, row in enumerate(x.tolist()):
            for o in range(index * size, (index + 1) * size):
                y = sum(w * v for w, v in zip(lora.weight[o].tolist(), row, strict=True)) + lora.bias[o].item()
                for r in range(rank * place):
                    low = sum(w * v for w, v in zip(a[part * rank + r], row, strict=True))
                    y += 3.0 / rank * b[part * size + o - index * size][r] * low
                assert lora(x)[n, o].item() == pytest.approx(y, abs=1e-12)
    assert torch.allclose(F.linear(x, *affine(lora)), lora(x), rtol=0, atol=1e-12)


def test_blocks_stand_in_the_rows_of_their_parts():
    b = random(4, 2)
    whole = spread(b, (True, False, True))
    assert whole.shape == (6, 4)
    assert torch.equal(whole[:2, :2], b[:2])
    assert torch.equal(whole[4:, 2:], b[2:])
    assert not whole[2:4].any()
    assert not whole[:2, 2:].any()
    assert torch.equal(spread(b, (True,)), b)


def test_dropout_is_of_what_the_update_sees_and_only_in_training():
    lora, x = layer(dropout=0.5).train(), random(7, 6, seed=2)
    torch.manual_seed(3)
    seen = F.dropout(x, 0.5)
    torch.manual_seed(3)
    expected = F.linear(x, lora.weight, lora.bias) + F.linear(seen, lora.effective_weight() - lora.weight)
    assert torch.allclose(lora(x), expected, rtol=0, atol=1e-12)
    assert (lora(x) - lora.eval()(x)).abs().max() > 0.01


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_start(start):
    """A as in the authors' code (uniform within +-1/sqrt(in)) or Gaussian, B zero: the host's output, bit for bit."""
    model, x = vit(), random(2, 3, 16, 16)
    before = model(x)
    assert torch.equal(check(graft(model, LoRA(linears=EVERY, start=start)), x)(x), before)
    a = model.blocks[0].attn.qkv.lora_A
    assert a.shape == (2 * 8, 24)
    if start == "uniform":
        assert a.abs().max() <= 1 / math.sqrt(24)
        assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 24), rel=0.1)
    else:
        assert a.std().item() == pytest.approx(1 / 8, rel=0.1)
        assert a.abs().max() > 0.3
    assert not any(p.any() for name, p in new_parameters(model).items() if name.endswith("lora_B"))
    assert torch.equal(a, graft(vit(), LoRA(linears=EVERY, start=start)).blocks[0].attn.qkv.lora_A)
    assert not torch.equal(a, graft(vit(), LoRA(linears=EVERY, start=start, seed=1)).blocks[0].attn.qkv.lora_A)


@pytest.mark.parametrize(
    ("width", "depth", "rank", "published"), [(768, 12, 8, 0.3), (1536, 48, 16, 4.7), (12288, 96, 1, 4.7), (12288, 96, 8, 37.7)]
)
def test_parameters_are_the_published_numbers(width, depth, rank, published):
    """Of W_q and W_v in RoBERTa-base, DeBERTa-XXL and GPT-3 (tables 2, 4): twice 2 r D numbers in a layer."""
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=width, depth=1, num_heads=12, num_classes=1)
    count = depth * sum(p.numel() for p in new_parameters(graft(model, LoRA(rank=rank))).values())
    assert count == 4 * rank * width * depth
    assert count / 1e6 == pytest.approx(published, abs=0.05)


PARTS = {
    "plain": ["qkv"],
    "grouped": ["q_proj", "v_proj"],
    "pvt": ["kv", "q"],
    "eva02": ["q_proj", "v_proj"],
    "cait": ["qkv"],
    "crossvit": ["qkv"],
}


@pytest.mark.parametrize("host", [*PARTS, "eva", "swin", "twins"])
def test_queries_and_values_get_a_pair_and_keys_none(host):
    """By default, in hosts with one layer for all three, one for each, and one for keys and values."""
    model = check(learned(graft(build(host), LoRA(layers=(0,)))), images())
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert sorted({name.rpartition(".")[2] for name in found}) == PARTS.get(host, ["qkv"])
    for name, lora in found.items():
        change = lora.effective_weight() - lora.weight
        parts = {"qkv": "qkv", "kv": "kv"}.get(name.rpartition(".")[2], "-")
        moved = [part for part, rows in zip(parts, change.chunk(len(parts)), strict=True) if rows.any()]
        assert moved == [part for part in parts if part != "k"]


def test_a_block_without_queries_by_name_gets_pairs_everywhere():
    model = check(learned(graft(build("parallel_scaling"), LoRA(layers=(0,)))), images())
    names = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert names == {f"blocks.0.{name}" for name in ("in_proj", "attn_out_proj", "mlp_out_proj")}


def spectrum(model):
    attention = model.blocks[1].attn
    return spectra.weight(attention, attention.num_heads, attention.head_dim).values


def attention_maps(model):
    return torch.from_numpy(look(model, images(), noise=0).maps["attention", 1].copy())


def imported_sigma(model):
    calibrate(graft(model, "svda:start=import"), images())
    return model.blocks[1].attn.sigma.detach()


def query_weights(model):
    return query_key_weights(model.blocks[1].attn)[0]


@pytest.mark.parametrize("read", [query_weights, spectrum, attention_maps, imported_sigma])
def test_an_update_on_qkv_is_in_spectra_maps_and_import(read):
    """Each is that of the model with W' = W + (alpha / r) B A as its weight, and another than the host's."""
    ours, theirs = (learned(graft(build("plain"), LoRA())) for _ in range(2))
    assert len(fold(theirs).changed) == 4
    ours, theirs, host = read(ours), read(theirs), read(build("plain"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert (ours - host).abs().max() > 5e-3


@pytest.mark.parametrize("text", ["lora", "lora:linears=qkv+proj+fc1+fc2,parts=none,rank=3"])
def test_folded_is_a_plain_network_with_the_same_output(text):
    model, x = learned(graft(vit(), text)), random(2, 3, 16, 16)
    host, out = vit(), model(x)
    removal = fold(model)
    assert not grafts(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in host.modules()}
    assert model.state_dict().keys() == host.state_dict().keys()
    assert (model(x) - out).abs().max() < 1e-12
    assert (host(x) - out).abs().max() > 1e-2
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, host.state_dict()[name])}
    written = tuple(f"{name}.weight" for name in parse(text).linears or ("qkv",))
    assert (
        set(removal.changed)
        == changed
        == {name for name in host.state_dict() if name.startswith("blocks") and name.endswith(written)}
    )


def test_only_new_parameters_train():
    """With the rest frozen no host tensor gets a gradient, the loss falls, and removal gives back the host bit for bit."""
    model, x = vit(), random(8, 3, 16, 16)
    before, labels = model(x), torch.arange(8) % 5
    new = new_parameters(graft(model, LoRA(linears=EVERY, parts=None)))
    model.requires_grad_(False)
    for parameter in new.values():
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(new.values(), lr=0.03), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if name not in new)
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), before)


def test_names_of_peft():
    """Its wrapper's names become ours; the authors' own are ours already."""
    model = graft(vit(), "lora:parts=none")
    ours = model.state_dict()
    theirs = {}
    for name, value in ours.items():
        name = name.replace(".lora_A", ".lora_A.default.weight").replace(".lora_B", ".lora_B.weight")
        theirs[name.replace(".qkv.weight", ".qkv.base_layer.weight").replace(".qkv.bias", ".qkv.base_layer.bias")] = value
    assert theirs.keys() != ours.keys()
    assert LoRA().renamed(theirs).keys() == ours.keys() == LoRA().renamed(ours).keys()


def test_real_weights(shared_data):
    """On the real ViT-Tiny the logits are the same bit for bit, with 73,728 parameters more; folded to 1e-5 of the learned."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:2]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, LoRA())(x), before)
        assert sum(p.numel() for p in new_parameters(model).values()) == 73_728
        out = learned(model, 0.02)(x)
        fold(model)
        assert (out - before).abs().max() > 0.1
        assert (model(x) - out).abs().max() < 1e-5 * out.abs().max()


def test_bad_input():
    for text in ("rank=0", "alpha=0.0", "dropout=1.0"):
        with pytest.raises(SettingError, match=f"Found {text}. Expected"):
            parse(f"lora:{text}")
    with pytest.raises(HostError, match=r"blocks\.0 has no linear layer 'fc9'"):
        graft(vit(), "lora:linears=fc9")
    with pytest.raises(
        HostError, match=r"No layer of blocks\.0 that is meant by lora:linears=k_proj holds any of parts=q\+v\. Expected one"
    ):
        graft(build("grouped"), "lora:linears=k_proj")
    with pytest.raises(GraftError, match="already holds LoRALinear, which overrides the layer"):
        graft(vit(), "lora", "lora")
    with pytest.raises(HostError, match="Found a layer of 13 numbers for 3 parts"):
        adapted(nn.Linear(6, 13), (True, False, True), LoRA(), torch.Generator())
    swin = timm.create_model("swinv2_tiny_window8_256", embed_dim=12, depths=(1, 1), num_heads=(1, 1), img_size=64)
    with pytest.raises(HostError, match=r"attn\.qkv of this SwinTransformerV2 stands in an attention that reads its weight"):
        graft(swin, "lora")
