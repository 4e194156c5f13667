# SPDX-License-Identifier: Apache-2.0
"""Ties an experts module that keeps its own parameters (roads B and C) to packed experts.

The packed experts point into the parameters: no second copy. Parameters move (`.to()`, accelerate's
offload gives them a new address at every call), so every call compares where they are with where
they were, and packs again after a change: microseconds for the comparison, and a pointer is never
used after its memory is gone.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError
from ..formats import get_format
from ..loading import DTYPES, ExpertsLayout, LayerSource, Whole, assemble
from ..loading.in_memory import InMemory
from ..weights import PackedExperts
from .layers import recognise

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
    """The packed experts of one module, made when first asked for and whenever parameters change.

    device, format  where and how a plan wants them; None means: as the parameters are.
    search, mode    how they are quantised and computed, if the format is a quantised one
    """

    def __init__(
        self,
        module: nn.Module | None,
        layout: ExpertsLayout,
        device: str | None = None,
        format: str | None = None,
        search: bool = False,
        mode: str = "exact",
    ) -> None:
        self.layout = layout
        self.device = device
        self.format = format
        self.search, self.mode = search, mode
        self.key = next(_keys)
        if module is not None:
            _modules[self.key] = module
        self._owner = None if module is None else weakref.ref(module)
        self._made_from: tuple[Any, ...] | None = None
        self._packed: PackedExperts | None = None

    def belongs_to(self, module: nn.Module) -> bool:
        return self._owner is not None and self._owner() is module

    def for_module(self, module: nn.Module | None) -> "Binding":
        """The same wishes for another module, such as a copy of this one."""
        return Binding(module, self.layout, self.device, self.format, self.search, self.mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Binding":
        return self.for_module(None)  # the copied module has parameters of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return Binding, (None, self.layout, self.device, self.format, self.search, self.mode)

    def packed(self) -> PackedExperts:
        """The packed experts of the parameters as they are now."""
        module = None if self._owner is None else self._owner()
        assert module is not None, "bindings are reached through their module"
        parameters = [
            parameter for parameter in module._parameters.values() if parameter is not None
        ]
        state = tuple(_state(parameter) for parameter in parameters)
        if self._packed is None or state != self._made_from:
            self._packed = None  # the old ones go before the new ones come
            if self.layout.transposed:
                lay_out_for_kernels(module)
                state = tuple(_state(parameter) for parameter in parameters)
            self._packed = self._pack(module)
            self._made_from = state
        return self._packed

    def _pack(self, module: nn.Module) -> PackedExperts:
        if self.format is not None and get_format(self.format).base not in DTYPES:
            return self._quantise(module, self.format)
        layout = self.layout
        gate_up, down = _parameter(module, "gate_up_proj"), _parameter(module, "down_proj")
        if layout.transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        gate_up_bias = down_bias = None
        if layout.has_bias:
            gate_up_bias = _parameter(module, "gate_up_proj_bias")
            down_bias = _parameter(module, "down_proj_bias")
        dtype = DTYPES[self.format] if self.format is not None else gate_up.dtype
        device = torch.device(self.device) if self.device is not None else gate_up.device
        return PackedExperts.from_tensors(
            gate_up.to(device, dtype),  # no copy where device and dtype already are the plan's
            down.to(device, dtype),
            gate_up_bias=None if gate_up_bias is None else gate_up_bias.to(device),
            down_bias=None if down_bias is None else down_bias.to(device),
            activation=layout.activation,
            interleaved=layout.interleaved,
            alpha=layout.alpha,
            limit=layout.limit,
        )

    def _quantise(self, module: nn.Module, format: str) -> PackedExperts:
        names = list(self.layout.parameter_shapes())
        parameters = {name: _parameter(module, name) for name in names}
        owner = type(module).__name__
        return assemble(
            InMemory(parameters, owner),
            LayerSource(owner, self.layout, {name: Whole(name) for name in names}),
            format=format,
            device=self.device or str(parameters[names[0]].device),
            search=self.search,
            mode=self.mode,
        )


def _state(parameter: Tensor) -> tuple[Any, ...]:
    # The version counts in-place writes: biases and converted weights are copies.
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), parameter.dtype, parameter.device, parameter.stride(), version


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter: Tensor = getattr(module, name).detach()
    if parameter.device.type == "meta":
        raise KernelError(
            f"{type(module).__name__}.{name} has no storage (device meta): the model was not "
            "loaded, or something offloaded this layer. Load it with quantization_config="
            "expertyard.ExpertsConfig(...) instead: the experts then stay where the plan says."
        )
    return parameter


def bind(
    module: nn.Module,
    device: str | None = None,
    format: str | None = None,
    *,
    search: bool = False,
    mode: str = "exact",
) -> Binding:
    """A new binding for the module, which keeps it; replaces an older one.

    Raises KernelError if the module's experts cannot be recognised.
    """
    layout = recognise(module, "experts")
    return _keep(module, Binding(module, layout, device, format, search, mode))


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


def lay_out_for_kernels(module: nn.Module) -> None:
    """Gives transposed parameters [E, in, out] a storage whose rows a kernel can read.

    Shape and values stay, the strides change: the parameter becomes a transposed view of contiguous
    [E, out, in] storage, and the old storage is freed.
    """
    _lay_out(module, lambda parameter: parameter.transpose(1, 2))


def lay_out_as_declared(module: nn.Module) -> None:
    """Undoes lay_out_for_kernels(): contiguous parameters, bit for bit those from before."""
    _lay_out(module, lambda parameter: parameter)


def _lay_out(module: nn.Module, view: Any) -> None:
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(module, name)
            if parameter.device.type != "meta" and not view(parameter).is_contiguous():
                parameter.data = view(view(parameter.data).contiguous())
