"""Laws of whole networks: functions of (network), a `testing.networks.Network`."""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.errors import HostError, SettingError, VitreousError
from vitreous.deploy.formats import check_onnx, run_onnx, write_onnx
from vitreous.lens.look import look
from vitreous.testing.check import THREE_PARTS, close, holds
from vitreous.testing.hosts import anatomy


def is_registered(network: Any) -> None:
    """timm lists it; the function that makes it has a docstring, and its class names a source."""
    holds(network.name in timm.list_models(), "timm does not list it")
    words = inspect.getdoc(timm.models.model_entrypoint(network.name)) or ""
    holds(bool(words.strip()), "no docstring of the function that is registered")
    sources = [inspect.getdoc(cls) or "" for cls in type(network.build()).__mro__ if cls.__module__.partition(".")[0] != "timm"]
    holds(any("Paper:" in text or "Source:" in text for text in sources), "no 'Paper:' in the docstring of its class")


def configuration_names_modules(network: Any) -> None:
    """`first_conv` and `classifier` in its configuration name modules of that kind."""
    model = network.build()
    modules, config = dict(model.named_modules()), model.pretrained_cfg
    names = {key: config.get(key) for key in ("first_conv", "classifier")}
    first = names["first_conv"]  # None where images do not enter through a convolution
    holds(first is None or isinstance(modules.get(first), nn.Conv2d), f"first_conv={first!r} is no convolution")
    named = [modules.get(name) for name in several(names["classifier"])]  # an auxiliary head may be one more
    right = None not in named and all(any(head is one for one in named) for head in several(model.get_classifier()))
    holds(right, f"classifier={names['classifier']!r} is not its classifier")


def several(value: Any) -> list[Any]:
    """A list of one or more: distilled networks have two classifiers."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def features_are_as_announced(network: Any) -> None:
    """`features_only` gives the model's features, in the channels and sizes of `feature_info`."""
    model = network.build()
    pruned = network.create(features_only=True, out_indices=tuple(range(len(model.feature_info)))).eval()
    weights = model.state_dict()
    pruned.model.load_state_dict({name: weights[name] for name in pruned.model.state_dict()})
    features, info = pruned(network.images()), pruned.feature_info
    announced = [(c, ceil(network.size / r)) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    shapes = [(y.shape[1], y.shape[2]) for y in features]
    holds(bool(features) and shapes == announced, f"features of (channels, height) {shapes}, announced {announced}")
    taken = model.forward_intermediates(network.images(), intermediates_only=True)
    for feature in features:
        holds(any(torch.equal(feature, y) for y in taken), "features that are not those of forward_intermediates")


def intermediates_end_in_the_features(network: Any) -> None:
    """`forward_intermediates` ends in `forward_features`, from which the logits follow."""
    model, x = network.build(), network.images()
    final, features = model.forward_intermediates(x)[0], model.forward_features(x)
    close(final, features, "final features", 1e-6)
    close(model.forward_head(features), model(x), "logits of the features", 1e-6)


def outputs_are_logits(network: Any) -> None:
    """Logits are finite, one for each class, and differ from image to image."""
    model = network.build(num_classes=7)
    logits = model(network.images())
    holds(logits.shape == (3, 7) and bool(logits.isfinite().all()), f"logits of shape {tuple(logits.shape)}, or not finite")
    holds(not torch.allclose(logits[0], logits[1], atol=1e-4), "the same logits for two images")


def one_channel(network: Any) -> None:
    """It can be built for images of one channel."""
    model = network.build(in_chans=1)
    holds(bool(model(network.images()[:, :1]).isfinite().all()), "an output that is not finite")


def calls_agree(network: Any) -> None:
    """In eval mode a second call gives the same output, whatever was between the two."""
    model = network.build()
    first = model(network.images())
    model(network.images(seed=5))
    close(model(network.images()), first, "the output of a later call")


def batch_mates_do_not_matter(network: Any) -> None:
    """An image's output does not depend on the other images of its batch, not a number or not."""
    model, x = network.build(), network.images(4)
    alone = model(x)[:1]
    mates = torch.stack([torch.full_like(x[0], value) for value in (0.5, 1e4, torch.nan)])
    for others in (network.images(3, seed=2), torch.zeros_like(x[1:]), mates):
        close(model(torch.cat([x[:1], others]))[:1], alone, "the output beside other images", 1e-6)
    close(model(x[:1]), alone, "the output of the image alone", 1e-4)


def double_precision_agrees(network: Any) -> None:
    """Double precision confirms single precision."""
    out = network.build().double()(network.images().double())
    close(network.build()(network.images()).double(), out, "float32 beside float64", 1e-4)


def autocast_is_close(network: Any) -> None:
    """bfloat16 autocast is finite and, in the median of 8 images, within 10 % of float32."""
    model = network.build()
    full = model(network.images(8))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(network.images(8)).float()
    error = ((low - full).norm(dim=1) / full.norm(dim=1)).median().item()
    holds(bool(low.isfinite().all()) and error < 0.1, f"a median error of {error:.3f}")


def classifier_can_be_replaced(network: Any) -> None:
    """`reset_classifier` gives other classes or none, and leaves the features as they are."""
    model = network.build()
    features = model.forward_features(network.images())
    for classes in (3, 0):
        model.reset_classifier(classes)
        width = classes or model.num_features
        out = model(network.images())
        holds(out.shape == (3, width) and model.num_classes == classes, f"output {tuple(out.shape)} of {classes} classes")
    close(model.forward_features(network.images()), features, "the features")
    pooled = model.forward_head(features, pre_logits=True)
    holds(pooled.shape == (3, model.head_hidden_size), f"pooled features of shape {tuple(pooled.shape)}")


def layers_are_in_order(network: Any) -> None:
    """`group_matcher` puts each parameter into a layer, the stem first, the head last."""
    model = network.build()
    names = [name for name, _ in model.named_parameters()]
    stem = next((name for name in names if name.startswith(("patch_embed.", "stem."))), names[0])
    for coarse in (False, True):
        layers = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=coarse), reverse=True)
        holds(sorted(layers) == sorted(names), "parameters without a layer, or in two")
        ends = layers[stem], layers[names[-1]]
        holds(ends == (0, max(layers.values())) and ends[1] > 1, f"layers {ends} of {stem} and {names[-1]}")
    rates = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    holds(len(rates) > 2, f"{len(rates)} rates in layer decay")


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """Logits in training mode, gradients of all that learn, the count of stored numbers.

    The loss is of the features too: behind the last block a class token's logits see no patch.
    """
    sizes = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.train().forward_features(x)
    logits = model.forward_head(features)
    loss = F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1]) + features.tanh().mean()
    loss.backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sum(sizes)


def every_parameter_learns(network: Any) -> None:
    """Each parameter has a gradient, finite and not zero."""
    _, learning, _ = gradients(network.build(), network.images(4))
    wrong = [name for name, g in learning.items() if g is None or not g.isfinite().all() or not g.any()]
    holds(not wrong, f"no gradient, or none that is finite and not zero, in {', '.join(wrong)}")


def checkpointing_changes_nothing(network: Any) -> None:
    """With gradient checkpointing, outputs and gradients are the same, and less is stored."""
    logits, plain, stored = gradients(network.build(), network.images(4))
    model = network.build()
    model.set_grad_checkpointing(True)
    again, checkpointed, less = gradients(model, network.images(4))
    holds(less < stored, f"{less} numbers stored with checkpointing, {stored} without")
    close(again, logits, "the output", 1e-5)
    for name, gradient in plain.items():
        if gradient is not None:
            close(checkpointed[name], gradient, name, 1e-5)


def other_sizes_run_or_are_refused(network: Any) -> None:
    """Images of another size give logits, or an error that names the size."""
    model, size = network.build(), (network.size * 2, network.size * 3 // 2)
    try:
        logits = model(network.images(2, size=size))
    except (VitreousError, AssertionError) as error:  # timm's own networks assert
        holds(any(str(side) in str(error) for side in size), f"an error without the size: {error}")
        ours = isinstance(error, VitreousError)
        holds(not ours or bool(THREE_PARTS.match(str(error))), f"a message that is not in three parts: {error}")
    else:
        holds(bool(logits.isfinite().all()), "logits that are not finite")


def copies_are_whole(network: Any) -> None:
    """deepcopy and pickle give models that compute the same."""
    model = network.build()
    logits = model(network.images())
    for way, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        close(twin(network.images()), logits, f"{way}: the output")


def exports(network: Any) -> None:
    """torch.export takes it with batches of any size."""
    model = network.build()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (network.images(3),), dynamic_shapes=(batch,)).module()
    for count in (3, 5):
        close(program(network.images(count)), model(network.images(count)), f"the exported output of {count} images", 1e-5)


def converts_to_onnx(network: Any) -> None:
    """An ONNX file takes batches of any size; not checked without the packages of the extra."""
    try:
        check_onnx()
    except SettingError:
        return
    model = network.build()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        batch = write_onnx(model, file, {"versions": {}})["batch"]
        run = run_onnx(file)
    holds(batch == "any", f"a file for {batch} image")
    for count in (1, 3):
        close(run(network.images(count)), model(network.images(count)).detach(), f"the file's output of {count} images", 1e-4)


def look_reads_or_refuses(network: Any) -> None:
    """`look` gives maps, or says which modules it cannot read, and changes nothing."""
    model = network.build()
    before = anatomy(model)
    try:
        reading = look(model, network.images(2), noise=0)
    except HostError as error:
        holds(bool(THREE_PARTS.match(str(error))), f"a message that is not in three parts: {error}")
    else:
        holds(bool(list(reading.maps)), "a reading without maps")
    holds(anatomy(model) == before, "the model changed")
