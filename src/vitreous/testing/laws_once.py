"""Laws of a mechanism that do not depend on the kind of host, checked in one."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from dataclasses import replace

import torch
from timm.utils import ModelEmaV3

from vitreous.base.errors import HostError, SettingError
from vitreous.grafting import check, graft, ungraft
from vitreous.hosts.attention import set_fused
from vitreous.mechanism import Mechanism
from vitreous.testing.check import close, holds
from vitreous.testing.hosts import anatomy, build, fit, grafted, images
from vitreous.testing.laws_everywhere import unless_refused


def changes_are_pure(mechanism: Mechanism, host: str) -> None:
    """`changes` reads the model and writes nothing; one mechanism serves several models."""
    model = build(host)
    before, values = anatomy(model, records=True), copy.deepcopy(model.state_dict())
    holds(bool(mechanism.changes(model)), "no changes at all")
    after = anatomy(model, records=True)
    written = [name or "the model" for name in before | after if before.get(name) != after.get(name)]
    written += [name for name, value in model.state_dict().items() if not torch.equal(value, values[name])]
    holds(not written, f"written to: {', '.join(written)}")
    first, second = grafted(mechanism, host), grafted(mechanism, host)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    holds(not shared, f"{len(shared)} parameters in both of two models")


def grafting_is_repeatable(mechanism: Mechanism, host: str) -> None:
    """Two grafts of one mechanism start with the same values.

    The global random state is neither used nor moved.
    """
    state = torch.get_rng_state()
    first = grafted(mechanism, host)
    check(first, images())
    first(images()).sum().backward()
    holds(torch.equal(torch.get_rng_state(), state), "the global random state moved")
    torch.manual_seed(1234)
    second = grafted(mechanism, host)
    holds(list(first.state_dict()) == list(second.state_dict()), "other keys")
    for name, value in first.state_dict().items():
        close(second.state_dict()[name], value, name)


def conversion_reaches_everything(mechanism: Mechanism, host: str) -> None:
    """Graft and `.to(dtype)` commute, and removal gives back the converted host.

    New values that are made of the host's may differ by roundings.
    """
    for dtype in (torch.float64, torch.bfloat16):
        before, after = grafted(mechanism, host).to(dtype), graft(build(host).to(dtype), mechanism)
        x = images().to(dtype)
        kinds = {t.dtype for t in (*after.parameters(), *after.buffers()) if t.is_floating_point()} | {before(x).dtype}
        holds(kinds == {dtype}, f"{', '.join(map(str, kinds))} after .to({dtype})")
        rounding = 0 if mechanism.keeps_weights else 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        close(before(x), after(x), f"{dtype}, converted after and before", rounding)
        ungraft(before)
        close(before(x), build(host).to(dtype)(x), f"{dtype}, after removal")


def copies_are_whole(mechanism: Mechanism, host: str) -> None:
    """deepcopy and pickle give models that compute the same and share no module."""
    model = grafted(mechanism, host)
    before, logits = anatomy(model, records=True), model(images())
    for way, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        shared = {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
        holds(not shared, f"{way}: {len(shared)} modules in both")
        close(check(twin, images())(images()), logits, f"{way}: the output")
        holds(ungraft(twin).mechanisms == (mechanism,), f"{way}: another mechanism in the record")
        close(twin(images()), build(host)(images()), f"{way}: the output after removal")
        holds(anatomy(model, records=True) == before, f"{way}: the original changed")
    twin = copy.deepcopy(model).double()
    ungraft(twin)  # displaced modules that share tensors share them in the copy as well
    close(twin(images().double()), build(host).double()(images().double()), "a converted copy after removal")


def moving_average_follows(mechanism: Mechanism, host: str) -> None:
    """timm's moving average follows every parameter, loads, and gives up its graft."""
    model = grafted(mechanism, host)
    average, start = ModelEmaV3(model, decay=0.5), copy.deepcopy(model.state_dict())
    fit(model, model.parameters())
    average.update(model)
    for name, now in model.state_dict().items():
        torch.testing.assert_close(average.module.state_dict()[name], (start[name] + now) / 2, msg=f"the mean of {name}".format)
    model.load_state_dict(average.module.state_dict())
    close(model(images()), average.module(images()), "the output of the average")
    ungraft(average.module), ungraft(model)
    close(model(images()), average.module(images()), "the output of the average after removal")


def unusual_images_stay_finite(mechanism: Mechanism, host: str) -> None:
    """Black, constant, very dark and very bright images give finite outputs and gradients."""
    model = grafted(mechanism, host)
    x = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), 1e-6 * images(1)[0], 1e3 * images(1)[0]])
    out = model(x.requires_grad_())
    out.sum().backward()
    gradients = {"images": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wrong = [name for name, value in ({"the output": out} | gradients).items() if not value.isfinite().all()]
    holds(not wrong, f"values that are not finite in {', '.join(wrong)}")


def hidden_keys_give_zero(mechanism: Mechanism, host: str) -> None:
    """A query whose keys are all hidden gives a finite output, the same on every path.

    Those are with and without gradients, and with and without the fused kernel.
    """
    model = grafted(mechanism, host)
    n = model.forward_features(images()).shape[1]
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[n // 2] = False
    for kind in (mask, torch.zeros(n, n).masked_fill(~mask, -torch.inf)):
        features = unless_refused(model, images(), attn_mask=kind)
        if features is None:
            return
        features.sum().backward()
        wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        holds(bool(features.isfinite().all()), f"features that are not finite under a mask of {kind.dtype}")
        holds(not wrong, f"gradients that are not finite in {', '.join(wrong)} under a mask of {kind.dtype}")
        for fused in (True, False):
            set_fused(model, fused)
            with torch.no_grad():
                close(model.forward_features(images(), attn_mask=kind), features, f"without gradients, fused: {fused}", 1e-4)


def ends_of_settings_stay_finite(mechanism: Mechanism, host: str) -> None:
    """Each number among the settings may be 0, 1 or 100: refused in words, or a finite output."""
    for name in (name for name, value in vars(mechanism).items() if type(value) in (int, float)):
        for value in (0, 1, 100):
            with suppress(SettingError, HostError):
                model = grafted(replace(mechanism, **{name: type(getattr(mechanism, name))(value)}), host)
                holds(bool(model(images()).isfinite().all()), f"an output that is not finite with {name}={value}")


def compiles(mechanism: Mechanism, host: str) -> None:
    """With static shapes, torch.compile takes the model as one graph."""
    model = grafted(mechanism, host)
    torch.compiler.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(images()), model(images()), "the compiled output")


def exports(mechanism: Mechanism, host: str) -> None:
    """With static shapes, torch.export takes the model with batches of any size."""
    model = grafted(mechanism, host)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (images(3),), dynamic_shapes=(batch,)).module()
    for count in (3, 5):
        close(program(images(count)), model(images(count)), f"the exported output of {count} images", 1e-5)
