# SPDX-License-Identifier: Apache-2.0
"""Finds a model's experts modules and recognises what they compute.

An experts module is one that transformers' decorator `use_experts_implementation` has made: it says
how its parameters lie (is_transposed, is_concatenated, has_bias, ...) and how gate and up meet
(_apply_gate). The layout is read, the arithmetic is probed: random numbers go through the module's
own _apply_gate and through ours, and only agreement counts. A name proves nothing: two families may
share a class name and differ by a clamp.
"""

import re
from collections.abc import Iterator

from torch import nn

from ..errors import KernelError
from ..loading import ExpertsLayout
from .outside import is_outside, outside_layout
from .probe import probe_gate, probe_plain

__all__ = ["find_experts", "is_experts", "layer_number", "recognise"]

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
_WITHOUT_GATE = (("gate_up_proj", ("up_proj",)),)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' experts interface drives this module."""
    return all(hasattr(module, mark) for mark in _MARKS)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Every experts module by name; KernelError if some experts are none that we can recognise."""
    found = {
        name: module
        for name, module in model.named_modules()
        if is_experts(module) or is_outside(module)
    }
    strange = [name for name in _stacked_experts(model) if name not in found]
    if strange or not found:
        what = f"{type(model).__name__}: "
        if strange:
            kind = type(model.get_submodule(strange[0])).__name__
            what += f"the experts of {strange[0]} ({kind}) do not use"
        else:
            what += "no module uses"
        raise KernelError(
            f"{what} transformers' experts interface, so their weights cannot be recognised "
            "safely. docs/huggingface.md lists the families that can be."
        )
    return found


def _stacked_experts(model: nn.Module) -> Iterator[str]:
    """Modules that hold experts as 3-d parameters, or one module an expert."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and leaf == "experts":
            yield name
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 3 and leaf == "experts":
                yield name
                break


def layer_number(name: str) -> int:
    """The layer that a module belongs to: the first number in its name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if match is None:
        raise KernelError(f"{name}: expected a layer number in the name of an experts module.")
    return int(match[1])


def recognise(module: nn.Module, name: str) -> ExpertsLayout:
    """Layout and arithmetic of an experts module, on any device including meta.

    Raises KernelError, saying what is different, if our kernels do not compute what it computes.
    """
    who = f"{name} ({type(module).__name__})"
    if is_outside(module):
        return outside_layout(module, who)
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters()}
    if getattr(module, "has_post_expert_norm", False):  # stays with transformers
        shapes = {key: s for key, s in shapes.items() if not key.startswith("post_expert_norm.")}
    has_bias, gated = bool(module.has_bias), bool(module.has_gate)
    needed = _PARAMETERS if has_bias else _PARAMETERS[:2]
    if not gated:
        needed = ("up_proj", "down_proj")
    if shapes.keys() != set(needed):
        raise KernelError(
            f"{who}: expected the parameters {', '.join(needed)}, got {', '.join(sorted(shapes))}. "
            "No kernel of ours knows what the others do."
        )
    shape = shapes["down_proj"]
    transposed, interleaved = bool(module.is_transposed), not module.is_concatenated
    num_experts, out, inner = shape if len(shape) == 3 else (0, 0, 0)
    hidden_size, intermediate_size = (inner, out) if transposed else (out, inner)
    activation, alpha, limit = (
        probe_gate(module, who, interleaved) if gated else probe_plain(module, who)
    )
    layout = ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=activation,
        alpha=alpha,
        limit=limit,
        interleaved=interleaved,
        transposed=transposed,
        has_bias=has_bias,
        names=() if gated else _WITHOUT_GATE,
    )
    for key, expected_shape in layout.parameter_shapes().items():
        if shapes[key] != expected_shape:
            raise KernelError(
                f"{who}: expected {key} of shape {list(expected_shape)}, got {list(shapes[key])}."
            )
    return layout
