# SPDX-License-Identifier: Apache-2.0
"""verify(): proof, by running it, that every experts layer is on our kernels and where it should be.

Each experts module is called with one token while every torch op is watched: exactly one call of
expertyard::moe_experts, with the packed experts of that very module, counts. What a configuration
claims does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import VerifyError
from ..registration import IMPLEMENTATION
from ..weights import PackedExperts
from .attach import covered
from .binding import binding_of
from .layers import is_experts, layer_number
from .module import ExpertyardExperts
from .state import Promise, Promised, promise_of

__all__ = ["LayerReport", "VerifyReport", "verify"]

_PREFILL = 1024  # tokens; the number whose kernel is reported as the prefill kernel


@dataclass(frozen=True)
class LayerReport:
    """One experts layer: what runs it, where, and what it holds."""

    layer: int
    name: str
    kernel: str
    prefill_kernel: str
    device: str
    format: str
    num_experts: int
    nbytes: int


@dataclass(frozen=True)
class VerifyReport:
    """Every experts layer of the model; prints as a table."""

    layers: tuple[LayerReport, ...]

    def __rich__(self) -> Table:
        table = Table()
        for heading in ("layer", "module", "experts", "format", "device", "kernel"):
            table.add_column(
                heading, justify="right" if heading in ("layer", "experts") else "left"
            )
        table.add_column("GiB", justify="right")
        for row in self.layers:
            same = row.kernel == row.prefill_kernel
            kernel = row.kernel if same else f"{row.kernel}, {row.prefill_kernel}"
            cells = (row.layer, row.name, row.num_experts, row.format, row.device, kernel)
            table.add_row(*map(str, cells), f"{row.nbytes / 2**30:.3f}")
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def verify(model: Any) -> VerifyReport:
    """Runs one token through every experts layer and reports what computed it.

    Raises VerifyError, naming every layer at fault, if a layer does not run on a kernel of ours, or
    not on the device and in the format of the plan, or if the plan and the model know different
    layers.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    promise = promise_of(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if is_experts(module) or isinstance(module, ExpertyardExperts)
    }
    if not modules:
        raise VerifyError(f"{type(model).__name__} has no experts layer that Expertyard knows.")
    promised = {layer.name: layer for layer in promise.layers} if promise is not None else {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    faults = [
        f"{name}: the plan has it, the model has no experts module there any more"
        for name in promised.keys() - modules.keys()
    ]
    reports = []
    for name, module in modules.items():
        fault = _misplaced(name, module, promise, promised.get(name))
        if fault is None:
            result = _run_one_token(name, module, promised.get(name), dtype)
            if isinstance(result, LayerReport):
                reports.append(result)
                continue
            fault = result
        faults.append(f"{name}: {fault}")
    if faults:
        raise VerifyError(
            f"{len(faults)} of {len(modules)} experts layers are not as they should be:\n  "
            + "\n  ".join(faults)
        )
    return VerifyReport(tuple(sorted(reports, key=lambda report: report.layer)))


def _misplaced(
    name: str, module: nn.Module, promise: Promise | None, promised: Promised | None
) -> str | None:
    """What is wrong with a module as it stands, before it runs."""
    if promise is not None and promised is None:
        return f"the plan does not have this layer, which {type(module).__name__} runs"
    if isinstance(module, ExpertyardExperts):
        return None if module.packed is not None else "it holds no weights: loading did not finish"
    if promise is not None and promise.road == "load":
        return f"it was replaced by {type(module).__name__} after loading"
    if promise is not None:
        if not covered(module):
            return f"its forward was replaced: {type(module).__name__} runs it, not Expertyard"
        home = str(next(module.parameters()).device)
        if promise.plan is not None and promised is not None and home != promised.home:
            return f"its weights were moved from {promised.home} to {home} after attach()"
        return None
    chosen = getattr(module.config, "_experts_implementation", None)
    if chosen != IMPLEMENTATION:
        return (
            f'it runs transformers\' "{chosen}"; call '
            f'model.set_experts_implementation("{IMPLEMENTATION}")'
        )
    return None


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Notes the handle of every expertyard::moe_experts call."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.expertyard.moe_experts.default:
            self.handles.append(args[3])
        return func(*args, **(kwargs or {}))


def _run_one_token(
    name: str, module: nn.Module, promised: Promised | None, dtype: torch.dtype
) -> LayerReport | str:
    """The layer's report, or what is wrong with it."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu")
    if parameter is not None and parameter.device.type != "meta":
        device, dtype = parameter.device, parameter.dtype
    packed = _packed(module)
    hidden_size = packed.hidden_size if packed is not None else module.down_proj.shape[1]
    hidden_states = torch.full((1, hidden_size), 0.5, dtype=dtype, device=device)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    weights = torch.ones((1, 1), dtype=dtype, device=device)
    watch = _Watch()
    try:
        with torch.no_grad(), watch:
            module(hidden_states, ids, weights)
    except Exception as error:
        return f"it cannot run: {error}"
    packed = _packed(module)
    if packed is None or watch.handles != [packed.handle]:
        return f"expected one call of its own kernel, saw {len(watch.handles)} calls"
    if promised is not None and promised.device not in (None, str(packed.device)):
        return f"the plan says {promised.device}, its experts are on {packed.device}"
    if promised is not None and promised.format not in (None, packed.format):
        return f"the plan says {promised.format}, its experts are {packed.format}"
    return LayerReport(
        layer=layer_number(name),
        name=name,
        kernel=packed.kernel_name(1),
        prefill_kernel=packed.kernel_name(_PREFILL),
        device=str(packed.device),
        format=packed.format,
        num_experts=packed.num_experts,
        nbytes=packed.nbytes,
    )


def _packed(module: nn.Module) -> PackedExperts | None:
    if isinstance(module, ExpertyardExperts):
        return module.packed
    binding = binding_of(module)
    return None if binding is None else binding.packed()
