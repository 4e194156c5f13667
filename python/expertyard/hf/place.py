# SPDX-License-Identifier: Apache-2.0
"""Moves the dense part of a loaded model to the devices of its plan (road A).

transformers has loaded it into RAM. One device: `.to()`, no hooks, nothing that a compiler minds.
Several: every decoder layer and every module that the plan names goes to its own device, the rest
to the first layer's, and a forward hook brings each one's inputs to where it is. accelerate's hooks
are of no use here: to them "cpu" means storage, and they would compute everything on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import virtual
from ..devices import to_device, torch_device
from ..dispatch import bring
from ..plan import Plan
from .state import Promised

__all__ = ["place_dense"]


def place_dense(model: nn.Module, plan: Plan, promises: tuple[Promised, ...]) -> None:
    """Moves parameters and buffers; packed experts are none and stay.

    A parameter that modules of several devices share is copied to each.
    Raises torch.OutOfMemoryError if a device has no room.
    """
    devices = {layer.layer: layer.device for layer in plan.layers}
    first = devices[min(devices)]
    if {*devices.values(), *plan.modules.values()} == {first} and virtual.gpu(first) is None:
        model.to(torch_device(first))
        return
    stacks = sorted({promised.name.partition(f".{promised.layer}.")[0] for promised in promises})
    layers = {
        f"{stack}.{number}": devices[number]
        for stack in stacks
        for number in range(len(list(model.get_submodule(stack).children())))
    }
    wanted = {**dict(plan.modules), **layers}
    placed: dict[tuple[int, str], torch.Tensor] = {}
    for name, module in model.named_modules():
        _place(module, _device_of(name, wanted, first), placed)
    for name in _stations(model, stacks):
        station = _Station(_device_of(name, wanted, first))
        module = model.get_submodule(name)
        module.register_forward_pre_hook(station.before, with_kwargs=True)
        if virtual.number():
            module.register_forward_hook(station.after, always_call=True)


def _device_of(name: str, wanted: dict[str, str], first: str) -> str:
    """The device of the longest name that this one is, or is in."""
    while name and name not in wanted:
        name = name.rpartition(".")[0]
    return wanted.get(name, first)


def _place(module: nn.Module, device: str, placed: dict[tuple[int, str], torch.Tensor]) -> None:
    """Moves what belongs to the module itself. placed: (id of what was, device) -> what is now."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is None:
                continue
            key = id(tensor), device
            if key not in placed:
                moved = to_device(tensor.detach(), device)
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                    moved.__dict__.update(tensor.__dict__)
                if virtual.number():
                    virtual.mark(moved, device)
                placed[key] = moved
                placed[id(moved), device] = moved  # so that its id stays its own
            table[name] = placed[key]  # type: ignore[assignment]


def _stations(model: nn.Module, stacks: list[str]) -> list[str]:
    """The decoder layers, and the modules beside and above them that own weights."""
    found: list[str] = []
    for stack in stacks:
        found.extend(f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children())
        path = stack.split(".")
        for depth in range(len(path)):
            above = ".".join(path[:depth])
            for name, child in model.get_submodule(above).named_children():
                if name != path[depth] and next(_tensors_of(child), None) is not None:
                    found.append(f"{above}.{name}" if above else name)
    return list(dict.fromkeys(found))


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Station:
    """A module to whose device inputs are brought."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.outer: list[str | None] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = tuple(_to(value, self.device) for value in args)
        there = {key: _to(value, self.device) for key, value in kwargs.items()}
        if virtual.number():
            self.outer.append(virtual.enter(self.device))
        return moved, there

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.outer:
            virtual.leave(self.outer.pop())


def _to(value: Any, device: str) -> Any:
    """A tensor, or tensors in a tuple, list or dict, on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return bring(value, device)
    if type(value) in (tuple, list):
        return type(value)(_to(item, device) for item in value)
    if type(value) is dict:
        return {key: _to(item, device) for key, item in value.items()}
    return value
