"""Laws of a mechanism in every host that takes it: functions of (mechanism, host)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitreous.base.errors import MaskError
from vitreous.grafting import check, graft, grafts, new_parameters, ungraft
from vitreous.mechanism import Mechanism, parse
from vitreous.slots import prefix
from vitreous.testing.check import close, holds
from vitreous.testing.hosts import CLASSES, SIZE, anatomy, build, fit, grafted, images, loss, per_place


def output_has_the_hosts_shape(mechanism: Mechanism, host: str) -> None:
    """Outputs are finite and shaped as the host's, and the pass calls every grafted module."""
    model, plain = check(grafted(mechanism, host), images()), build(host)
    with torch.no_grad():
        features, logits, before = model.forward_features(images()), model(images()), plain.forward_features(images())
    tokens = before.shape[1] + (per_place(model) - 1) * (before.shape[1] - prefix(model))
    holds(features.shape == (3, tokens, before.shape[2]), f"features of shape {tuple(features.shape)}")
    holds(logits.shape == (3, CLASSES), f"logits of shape {tuple(logits.shape)}")
    holds(bool(features.isfinite().all() and logits.isfinite().all()), "an output that is not finite")


def exact_at_init(mechanism: Mechanism, host: str) -> None:
    """The grafted model equals the host before training just where `exact_at_init` says so."""
    same = torch.equal(grafted(mechanism, host)(images()), build(host)(images()))
    holds(same == mechanism.exact_at_init, f"exact_at_init={mechanism.exact_at_init}, and outputs equal: {same}")


def batch_mates_do_not_matter(mechanism: Mechanism, host: str) -> None:
    """An image's output does not depend on the other images of its batch.

    Those are other pictures; black; grey, far too bright and not a number.
    """
    model, x = grafted(mechanism, host), images(4)
    alone = model(x)[:1]
    mates = torch.stack([torch.full_like(x[0], value) for value in (0.5, 1e4, torch.nan)])
    for others in (images(3, seed=2), torch.zeros_like(x[1:]), mates):
        close(model(torch.cat([x[:1], others]))[:1], alone, "the output beside other images")
    close(model(x[:1]), alone, "the output of the image alone", 1e-4)


def calls_agree(mechanism: Mechanism, host: str) -> None:
    """In eval mode a second call gives the same output, whatever was between the two."""
    model = grafted(mechanism, host)
    first = model(images())
    model(images(seed=5))
    close(model(images()), first, "the output of a later call")


def double_precision_agrees(mechanism: Mechanism, host: str) -> None:
    """Double precision confirms single precision."""
    out = grafted(mechanism, host).double()(images().double())
    close(grafted(mechanism, host)(images()).double(), out, "float32 beside float64", 1e-4)


def autocast(mechanism: Mechanism, host: str) -> None:
    """bfloat16 autocast is finite and, in the median of 8 images, within 5 % of float32."""
    model = grafted(mechanism, host)
    full = model(images(8))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images(8)).float()
    error = ((low - full).norm(dim=1) / full.norm(dim=1)).median().item()
    holds(bool(low.isfinite().all()) and error < 0.05, f"a median error of {error:.3f}")


def new_parameters_learn(mechanism: Mechanism, host: str) -> None:
    """Each new parameter has a finite gradient in every step, not zero in all of three.

    In the first ones it may be zero: a gate may have to open first.
    """
    model = grafted(mechanism, host)
    learning, reached = new_parameters(model), set()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, images(4, seed=step)).backward()
        wrong = [name for name, p in learning.items() if p.grad is None or not p.grad.isfinite().all()]
        holds(not wrong, f"no finite gradient in {', '.join(wrong)}")
        reached |= {name for name, p in learning.items() if p.grad.any()}
        optimizer.step()
    holds(reached == set(learning), f"zero gradients in {', '.join(set(learning) - reached)}")


def plain_checkpoint_loads(mechanism: Mechanism, host: str) -> None:
    """With `keeps_weights` the host's checkpoint loads and misses just the new parameters."""
    weights, model = build(host).state_dict(), grafted(mechanism, host)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    holds(not unexpected, f"keys of the host that are gone: {', '.join(unexpected)}")
    holds(set(missing) == set(model.state_dict()) - set(weights), f"missing keys {', '.join(missing)}")
    own = {name for name, _ in build(host).named_parameters()}
    extra = {name for name, _ in model.named_parameters()} - own
    holds(extra == set(new_parameters(model)), f"new parameters {', '.join(extra)}")


def removal_is_exact(mechanism: Mechanism, host: str) -> None:
    """Removal gives back the same objects in the same order, and the output bit for bit."""
    model = build(host)
    before, logits = anatomy(model), model(images())
    removal = ungraft(graft(model, mechanism))
    after = anatomy(model)
    changed = [name or "the model" for name in before | after if before.get(name) != after.get(name)]
    holds(not changed, f"other objects or attributes in {', '.join(changed)}")
    holds(removal.changed == (), f"changed tensors: {', '.join(removal.changed)}")
    holds(removal.mechanisms == (mechanism,) and grafts(model) == [], f"{removal}, and {len(grafts(model))} grafts left")
    close(model(images()), logits, "the output after removal")


def training_new_parameters_keeps_the_host(mechanism: Mechanism, host: str) -> None:
    """Training the new parameters alone moves each of them, and the host comes back as it was."""
    model = build(host)
    logits = model(images())
    new = new_parameters(graft(model, mechanism))
    values = {name: p.detach().clone() for name, p in new.items()}
    fit(model, new.values(), steps=3)
    still = [name for name, p in new.items() if torch.equal(p, values[name])]
    holds(not still, f"parameters that did not move: {', '.join(still)}")
    removal = ungraft(model)
    holds(removal.changed == (), f"changed tensors: {', '.join(removal.changed)}")
    close(model(images()), logits, "the output after removal")


def training_is_kept(mechanism: Mechanism, host: str) -> None:
    """What the host's parameters learned stays after removal, and removal names what changed."""
    model, start = grafted(mechanism, host), dict(build(host).named_parameters())
    fit(model, model.parameters())
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if name not in new_parameters(model)}
    removal = ungraft(model)
    now = dict(model.named_parameters())
    holds(now.keys() == start.keys(), f"other parameters: {', '.join(now.keys() ^ start.keys())}")
    if mechanism.keeps_weights:
        for name, value in trained.items():
            close(now[name], value, name)
        moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
        holds(bool(moved) and set(removal.changed) == moved, f"named as changed: {', '.join(removal.changed)}")


def saved_weights_load(mechanism: Mechanism, host: str) -> None:
    """A model rebuilt from the text form takes the trained weights, and gives the same output."""
    model = grafted(mechanism, host)
    fit(model, model.parameters())
    rebuilt = grafted(parse(mechanism.full_text(), foreign=True), host)
    rebuilt.load_state_dict(model.state_dict())
    close(rebuilt(images()), model(images()), "the output of the rebuilt model")


def touched(model: nn.Module) -> tuple[bool, int]:
    """Whether a graft stands before the last block's end, and the first block that it touches."""
    paths = [change.path.split(".") for record in grafts(model) for change in record.changes]
    blocks = [int(path[1]) for path in paths if path[0] == "blocks"]
    embeds = any(path[0] == "patch_embed" for path in paths)
    return bool(blocks) or embeds, 0 if embeds or not blocks else min(blocks)


def intermediates(mechanism: Mechanism, host: str) -> None:
    """Intermediate features have the host's shapes and end in the features.

    Up to the first block that the graft touches they equal the host's.
    """
    plain, model = build(host), grafted(mechanism, host)
    grid, (inside, first) = tuple(model.patch_embed.dynamic_feat_size((SIZE, SIZE))), touched(model)
    for options in ({"output_fmt": "NCHW"}, {"output_fmt": "NLC"}, {"output_fmt": "NLC", "norm": True}):
        _, there = plain.forward_intermediates(images(), **options)
        final, here = model.forward_intermediates(images(), **options)
        close(final, model.forward_features(images()), f"{options}: the final features")
        shapes = [y.shape for y in here]
        picture = options["output_fmt"] == "NCHW"
        expected = [(*y.shape[:2], *grid) if picture else (len(y), math.prod(grid), y.shape[2]) for y in there]
        holds(shapes == expected, f"{options}: shapes {shapes}")
        if not options.get("norm"):
            for i in range(first):
                close(here[i], there[i], f"{options}: block {i}, which no graft touches")
            same = torch.equal(here[-1], there[-1])
            holds(same != (inside and not mechanism.exact_at_init), f"{options}: last block as the host's: {same}")


def masks(mechanism: Mechanism, host: str) -> None:
    """A mask that hides nothing changes nothing, and causal attention equals its mask.

    A model that cannot have a mask raises MaskError with the argument's name.
    """
    model, plain, x = grafted(mechanism, host), build(host), images()
    features = model.forward_features(x)
    n = features.shape[1]
    for mask in (torch.ones(n, n, dtype=torch.bool), torch.zeros(n, n)):
        masked = unless_refused(model, x, attn_mask=mask)
        if masked is not None:
            close(masked, features, f"under a mask of {mask.dtype} that hides nothing", 1e-5)
    causal = unless_refused(model, x, is_causal=True)
    if causal is None:
        return
    holds(not torch.allclose(causal, features, atol=1e-3), "is_causal=True changes nothing")
    lower = torch.ones(n, n, dtype=torch.bool).tril()
    close(model.forward_features(x, attn_mask=lower), causal, "is_causal=True beside the mask", 1e-5)
    pairs = (features, plain.forward_features(x)), (causal, plain.forward_features(x, is_causal=True))
    free, under = (here.shape == there.shape and torch.allclose(here, there, atol=1e-3) for here, there in pairs)
    holds(free == under, f"features as the host's: {free}, under causal attention: {under}")


def unless_refused(model: nn.Module, x: Tensor, **mask) -> Tensor | None:
    """The features under a mask, or None if the model says by name that it cannot have it."""
    try:
        return model.forward_features(x, **mask)
    except MaskError as error:
        if next(iter(mask)) in str(error):
            return None
        raise


def gradient_checkpointing(mechanism: Mechanism, host: str) -> None:
    """Output and all gradients are, bit for bit, those without checkpointing."""
    outcomes = []
    for enable in (False, True):
        model = grafted(mechanism, host).train()
        model.set_grad_checkpointing(enable)
        check(model, images())
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            logits = model(images())
        logits.square().sum().backward()
        outcomes.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (logits, others) = outcomes
    close(logits, plain, "the output")
    for name, gradient in gradients.items():
        holds((gradient is None) == (others[name] is None), f"{name} has a gradient on one of the two ways")
        if gradient is not None:
            close(others[name], gradient, f"the gradient of {name}")


def new_classes(mechanism: Mechanism, host: str) -> None:
    """`reset_classifier` works with the graft in, and stays after removal."""
    model, plain = grafted(mechanism, host), build(host)
    model.reset_classifier(7)
    logits, features = check(model, images())(images()), model.forward_features(images())
    holds(logits.shape == (3, 7), f"logits of shape {tuple(logits.shape)}")
    close(model.forward_head(features), logits, "forward_head of the features")
    inner = model.forward_head(features, pre_logits=True).shape
    holds(inner == (3, model.num_features), f"pre_logits of shape {tuple(inner)}")
    ungraft(model)
    plain.reset_classifier(7)
    plain.load_state_dict(model.state_dict())
    close(model(images()), plain(images()), "the output after removal")


def hooks_live_on(mechanism: Mechanism, host: str) -> None:
    """Hooks from before the graft fire with it and after it, and can be removed at any time."""
    model, seen = build(host), set()
    layer = model.blocks[-1]
    places = {"block": layer, "attn": getattr(layer, "attn", None), "norm": model.norm}
    handles = {
        name: module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in places.items()
        if module is not None
    }

    def all_fire(when: str) -> None:
        seen.clear()
        model(images())
        holds(seen == set(handles), f"{when}: hooks fired at {', '.join(sorted(seen))}, not at all of {', '.join(handles)}")

    all_fire("before the graft")
    graft(model, mechanism)
    all_fire("with the graft")
    handles.pop("block").remove()
    all_fire("with the graft, one hook less")
    ungraft(model)
    all_fire("after removal")
    handles.pop("norm").remove()
    all_fire("after removal, one hook less")
