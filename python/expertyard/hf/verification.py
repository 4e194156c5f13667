# SPDX-License-Identifier: Apache-2.0
"""verify(): proof, by running them, that all experts are on our kernels and where they should be.

Each experts module is called with one token, and the native counter of its packed experts must say
that a kernel served exactly one call. What a configuration claims does not count.
"""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..errors import VerifyError
from ..registration import IMPLEMENTATION
from ..weights import PackedExperts
from .attachment import covered
from .binding import binding_of
from .layers import is_experts, layer_number, recognise
from .module import ExpertyardExperts
from .state import Promise, Promised, promise_of

__all__ = ["LayerReport", "VerifyReport", "verify"]


@dataclass(frozen=True)
class LayerReport:
    """One experts layer: what runs it, where, and what it holds."""

    layer: int
    name: str
    kernel: str
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
            cells = (row.layer, row.name, row.num_experts, row.format, row.device, row.kernel)
            table.add_row(*map(str, cells), f"{row.nbytes / 2**30:.3g}")
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


def _run_one_token(
    name: str, module: nn.Module, promised: Promised | None, dtype: torch.dtype
) -> LayerReport | str:
    """The layer's report, or what is wrong with it."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu")
    if parameter is not None and parameter.device.type != "meta":
        device, dtype = parameter.device, parameter.dtype
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    weights = torch.ones((1, 1), dtype=dtype, device=device)
    try:
        packed = _packed(module)
        before = 0 if packed is None else packed.calls
        layout = module.layout if isinstance(module, ExpertyardExperts) else recognise(module, name)
        hidden_states = torch.full((1, layout.hidden_size), 0.5, dtype=dtype, device=device)
        with torch.no_grad():
            module(hidden_states, ids, weights)
    except Exception as error:
        return f"it cannot run: {error}"
    again = _packed(module)
    if again is not None and again.device.type == "cuda":
        torch.cuda.synchronize(again.device)  # the count is taken when the kernel has run
    calls = 0 if again is None else again.calls - (before if again is packed else 0)
    kernel = None if again is None else again.last_kernel
    if again is None or kernel is None or calls != 1:
        return f"expected one call of a kernel of ours, counted {calls}"
    packed = again
    if promised is not None and promised.device not in (None, str(packed.device)):
        return f"the plan says {promised.device}, its experts are on {packed.device}"
    if promised is not None and promised.format not in (None, packed.format):
        return f"the plan says {promised.format}, its experts are {packed.format}"
    return LayerReport(
        layer=layer_number(name),
        name=name,
        kernel=kernel,
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
