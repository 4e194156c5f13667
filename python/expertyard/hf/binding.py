# SPDX-License-Identifier: Apache-2.0
"""Ties an experts module that keeps its own parameters (roads B and C) to packed experts.

The packed experts point into the parameters: no second copy. Parameters move (`.to()`, accelerate's
offload gives them a new address at every call), so every call compares where they are with where
they were, and packs again after a change: microseconds for the comparison, and a pointer is never
used after its memory is gone.
"""

import itertools
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import LayerExperts, PartPlan, Placement, RunOptions, make_policy
from ..errors import KernelError
from ..loading import ExpertsLayout
from ..weights import FORMAT_OF_DTYPE
from .layers import recognise
from .parts import experts_of_tensors

__all__ = [
    "Binding",
    "bind",
    "binding_of",
    "bound_module",
    "lay_out_as_declared",
    "lay_out_for_kernels",
    "unbind",
]

_ATTRIBUTE = "_expertyard_binding"
_keys = itertools.count(1)
_modules: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()


class Binding:
    """The experts of one module, made when first asked for and whenever parameters change.

    placement  where and how a plan wants them; None means: as the parameters are.
    """

    def __init__(
        self,
        module: nn.Module | None,
        layout: ExpertsLayout,
        placement: Placement | None = None,
        options: RunOptions | None = None,
        layer: int = 0,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.options = options or RunOptions()
        self.layer = layer
        self.key = next(_keys)
        if module is not None:
            _modules[self.key] = module
        self._owner = None if module is None else weakref.ref(module)
        self._made_from: tuple[Any, ...] | None = None
        self._experts: LayerExperts | None = None

    def belongs_to(self, module: nn.Module) -> bool:
        return self._owner is not None and self._owner() is module

    def for_module(self, module: nn.Module | None) -> "Binding":
        """The same wishes for another module, such as a copy of this one."""
        return Binding(module, self.layout, self.placement, self.options, self.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Binding":
        return self.for_module(None)  # the copied module has parameters of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return Binding, (None, self.layout, self.placement, self.options, self.layer)

    def experts(self) -> LayerExperts:
        """The experts of the parameters as they are now."""
        module = None if self._owner is None else self._owner()
        assert module is not None, "bindings are reached through their module"
        parameters = [
            module.get_parameter(name)
            for ours in self.layout.parameters
            for name in self.layout.names_of(ours)
        ]
        state = tuple(_state(parameter) for parameter in parameters)
        if self._experts is None or state != self._made_from:
            before, self._experts = self._experts, None  # the old go before the new come
            moved = {} if before is None else before.moved
            after = None if before is None else before.after
            first = before is None
            del before
            if self.layout.transposed:
                lay_out_for_kernels(module, self.layout)
                state = tuple(_state(parameter) for parameter in parameters)
            self._experts = self._make(module)
            for expert, device in moved.items():
                self._experts.move(expert, device)
            self._experts.after = (
                make_policy(self.options.policy, self._experts) if first else after
            )
            self._made_from = state
        return self._experts

    def _make(self, module: nn.Module) -> LayerExperts:
        tensors = {
            ours: _parameter(module, *self.layout.names_of(ours)) for ours in self.layout.parameters
        }
        if self.layout.transposed:
            for name in ("gate_up_proj", "down_proj"):
                tensors[name] = tensors[name].transpose(1, 2)
        if self.layout.spare:
            tensors["gate_up_proj"] = tensors["gate_up_proj"][: self.layout.num_experts]
        gate_up = tensors["gate_up_proj"]
        home = str(gate_up.device)
        placement = self.placement
        if placement is None:
            if gate_up.dtype not in FORMAT_OF_DTYPE:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FORMAT_OF_DTYPE)
                raise KernelError(
                    f"{type(module).__name__}: expected weights in {known}, got {gate_up.dtype}."
                )
            ids = tuple(range(self.layout.num_experts))
            format, op = FORMAT_OF_DTYPE[gate_up.dtype], gate_up.device.type
            placement = Placement(home, (PartPlan(ids, home, format, op, "as they are"),))
        # the dense part of the model stays where it is, and so do hidden states
        placement = replace(placement, home=home)
        return experts_of_tensors(
            self.layout, tensors, placement, layer=self.layer, options=self.options
        )


def _state(parameter: Tensor) -> tuple[Any, ...]:
    # The version counts in-place writes: biases and converted weights are copies.
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), parameter.dtype, parameter.device, parameter.stride(), version


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter: Tensor = module.get_parameter(name).detach()
    if parameter.device.type == "meta":
        raise KernelError(
            f"{type(module).__name__}.{name} has no storage (device meta): the model was not "
            "loaded, or something offloaded this layer. Load it with quantization_config="
            "expertyard.ExpertsConfig(...) instead: the experts then stay where the plan says."
        )
    return parameter


def bind(
    module: nn.Module,
    placement: Placement | None = None,
    options: RunOptions | None = None,
    layer: int = 0,
) -> Binding:
    """A new binding for the module, which keeps it; replaces an older one.

    Raises KernelError if the module's experts cannot be recognised, or not be used in place.
    """
    layout = recognise(module, "experts")
    if layout.flat:
        raise KernelError(
            f"{type(module).__name__} keeps its down projections as [num_experts * "
            "intermediate_size, hidden_size], whose rows no kernel can read in place. Load the "
            "model with expertyard.from_pretrained(), which lays them out anew."
        )
    return _keep(module, Binding(module, layout, placement, options, layer))


def binding_of(module: nn.Module) -> Binding | None:
    """The module's binding; one that came with a copied module is made the copy's own."""
    binding = module.__dict__.get(_ATTRIBUTE)
    if not isinstance(binding, Binding):
        return None
    return binding if binding.belongs_to(module) else _keep(module, binding.for_module(module))


def _keep(module: nn.Module, binding: Binding) -> Binding:
    module.__dict__[_ATTRIBUTE] = binding
    return binding


def unbind(module: nn.Module) -> Binding | None:
    """Forgets the module's packed experts; returns the binding that there was."""
    binding: Binding | None = module.__dict__.pop(_ATTRIBUTE, None)
    return binding


def bound_module(key: int) -> nn.Module:
    """The module of a binding's key, for the op that a compiled graph calls."""
    module = _modules.get(key)
    if module is None:
        raise KernelError("This compiled graph belongs to a model that is gone. Compile again.")
    return module


def lay_out_for_kernels(module: nn.Module, layout: ExpertsLayout) -> None:
    """Gives transposed parameters [E, in, out] a storage whose rows a kernel can read.

    Shape and values stay, the strides change: the parameter becomes a transposed view of contiguous
    [E, out, in] storage, and the old storage is freed.
    """
    _lay_out(module, layout, lambda parameter: parameter.transpose(1, 2))


def lay_out_as_declared(module: nn.Module, layout: ExpertsLayout) -> None:
    """Undoes lay_out_for_kernels(): contiguous parameters, bit for bit those from before."""
    _lay_out(module, layout, lambda parameter: parameter)


def _lay_out(module: nn.Module, layout: ExpertsLayout, view: Any) -> None:
    with torch.no_grad():
        for ours in ("gate_up_proj", "down_proj"):
            parameter = module.get_parameter(*layout.names_of(ours))
            if parameter.device.type != "meta" and not view(parameter).is_contiguous():
                parameter.data = view(view(parameter.data).contiguous())
