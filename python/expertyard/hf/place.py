# SPDX-License-Identifier: Apache-2.0
"""Moves the dense part of a loaded model to the devices of its plan (road A).

transformers has loaded it into RAM. One device: `.to()`, no hooks, nothing that a compiler minds.
Several: every decoder layer and every module that the plan names goes to its own device, the rest
to the first layer's, and a forward hook brings each one's inputs to where it is. accelerate's hooks
are of no use here: to them "cpu" means storage, and they would compute everything on a GPU.
"""

from typing import Any

import torch
from torch import nn

from ..plan import Plan
from .state import Promised

__all__ = ["place_dense"]


def place_dense(model: nn.Module, plan: Plan, promises: tuple[Promised, ...]) -> None:
    """Moves parameters and buffers; packed experts are none and stay."""
    devices = {layer.layer: layer.device for layer in plan.layers}
    first = devices[min(devices)]
    model.to(first)
    if {*devices.values(), *plan.modules.values()} == {first}:
        return
    here = dict(model.named_modules())
    for name, device in plan.modules.items():
        if name in here:
            here[name].to(device)
    stacks = sorted({promised.name.partition(f".{promised.layer}.")[0] for promised in promises})
    for stack in stacks:
        for number, layer in enumerate(model.get_submodule(stack).children()):
            layer.to(devices[number])
    for module in _stations(model, stacks):
        module.register_forward_pre_hook(_bring_inputs, with_kwargs=True)


def _stations(model: nn.Module, stacks: list[str]) -> list[nn.Module]:
    """The decoder layers, and the modules beside and above them that own weights."""
    found: list[nn.Module] = []
    for stack in stacks:
        found.extend(model.get_submodule(stack).children())
        path = stack.split(".")
        for depth in range(len(path)):
            parent = model.get_submodule(".".join(path[:depth]))
            beside = (child for name, child in parent.named_children() if name != path[depth])
            found.extend(child for child in beside if next(child.parameters(), None) is not None)
    return list(dict.fromkeys(found))


def _bring_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = next(module.parameters()).device
    moved = tuple(_to(value, device) for value in args)
    return moved, {key: _to(value, device) for key, value in kwargs.items()}


def _to(value: Any, device: torch.device) -> Any:
    """A tensor, or tensors in a tuple, list or dict, on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_to(item, device) for item in value)
    if type(value) is dict:
        return {key: _to(item, device) for key, item in value.items()}
    return value
