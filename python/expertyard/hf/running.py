# SPDX-License-Identifier: Apache-2.0
"""A model's layers of experts while it runs: what moves, what is recorded, what is explained."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dispatch import LayerExperts, RoutingRecord, make_policy
from ..dispatch.options import POLICIES
from ..errors import ConfigError, PlanError
from .binding import binding_of
from .module import ExpertyardExperts
from .state import promise_of

__all__ = ["deferral_error", "layers_of", "link", "move", "recording", "set_policy"]


def layers_of(model: Any) -> dict[int, LayerExperts]:
    """Layer number -> its experts. Raises ConfigError if none runs on Expertyard."""
    model = getattr(model, "_orig_mod", model)
    promise = promise_of(model)
    found: dict[int, LayerExperts] = {}
    for promised in promise.layers if promise is not None else ():
        module = model.get_submodule(promised.name)
        if isinstance(module, ExpertyardExperts):
            experts = module.experts
        else:
            binding = binding_of(module)
            experts = None if binding is None else binding.experts()
        if experts is not None:
            found[promised.layer] = experts
    if not found:
        raise ConfigError(
            f"{type(model).__name__} does not run on a plan of Expertyard. Load it with "
            "quantization_config=expertyard.ExpertsConfig(...), or expertyard.attach(model, ...)."
        )
    return found


def move(model: Any, layer: int, expert: int, device: str) -> None:
    """Moves one expert of a running model to another device, between two steps.

    device  "cpu" or a GPU that the machine has. The expert keeps its format, and its bits.
    Raises PlanError if there is no such layer, expert or device, torch.OutOfMemoryError if there is
    no room; nothing has changed then.
    """
    from ..devices import machine_memory

    layers = layers_of(model)
    if layer not in layers:
        raise PlanError(f"move: expected one of the layers {sorted(layers)}, got {layer!r}.")
    known = machine_memory()
    if device not in known:
        raise PlanError(f"move: expected one of {', '.join(known)}, got {device!r}.")
    layers[layer].move(expert, device)


def set_policy(model: Any, policy: str) -> None:
    """Changes RunOptions.policy of a model that runs: "static", "lru" or "frequency"."""
    if policy not in POLICIES:
        raise ConfigError(f"policy: expected one of {', '.join(POLICIES)}; got {policy!r}.")
    for layer in layers_of(model).values():
        layer.after = make_policy(policy, layer)


def link(layers: list[LayerExperts]) -> None:
    """The layers of one model share their hand-off buffers. Each layer's deferred share is added by
    the next one; the last one defers nothing."""
    for layer in layers:
        layer.desks = layers[0].desks
    for layer, later in itertools.pairwise(layers):
        layer.next = later


def deferral_error(model: Any, input_ids: Tensor) -> str:
    """What RunOptions.defer does to a prompt's logits, in a sentence.

    input_ids  [batch, tokens]; every position is computed with and without deferral.
    """
    layers = list(layers_of(model).values())
    options = [layer.options for layer in layers]
    input_ids = input_ids.to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        for layer in layers:
            layer.options = replace(layer.options, defer=0)
        exact = model(input_ids).logits.float().log_softmax(-1)
        for layer, own in zip(layers, options, strict=True):
            layer.options, layer.defers_any = own, True
        try:
            deferred = model(input_ids).logits.float().log_softmax(-1)
        finally:
            for layer in layers:
                layer.defers_any = False
    divergence = (exact.exp() * (exact - deferred)).sum(-1).mean()
    positions = exact[..., 0].numel()
    same = int((exact.argmax(-1) == deferred.argmax(-1)).sum())
    return (
        f"deferred: up to {options[0].defer} experts a token; on the prompt the likeliest token is "
        f"the same at {same} of {positions} positions, mean KL divergence {divergence:.2g}"
    )


@contextmanager
def recording(model: Any, *, traces: bool = True) -> Iterator[RoutingRecord]:
    """Records what the routers choose meanwhile; see RoutingRecord.save().

    traces  False: counts only, so that memory does not grow with the number of tokens
    """
    layers = layers_of(model)
    record = RoutingRecord(
        {number: experts.num_experts for number, experts in layers.items()}, traces=traces
    )
    before = {number: experts.after for number, experts in layers.items()}
    for number, experts in layers.items():
        experts.after = _observer(record, number, before[number])
    try:
        yield record
    finally:
        for number, experts in layers.items():
            experts.after = before[number]


def _observer(record: RoutingRecord, number: int, then: Any) -> Any:
    observe = record.observe

    def after(layer: LayerExperts, topk_ids: Tensor) -> None:
        observe(number, topk_ids)
        if then is not None:
            then(layer, topk_ids)

    return after
