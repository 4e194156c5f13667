# SPDX-License-Identifier: Apache-2.0
"""verify(): proof, by running them, that all experts are on our kernels and where they should be.

Each experts module is called with a token for each device that has some of its experts, and the
native counter there must say that a kernel served exactly one call. What a configuration claims
does not count. Other quantised layers, which have one way to run on each device, are run too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..devices import device_of
from ..dispatch import LayerExperts, split_rank
from ..errors import KernelError, PlanError, VerifyError
from ..linear import PackedLinear
from ..registration import IMPLEMENTATION
from ..weights import PackedExperts
from .attachment import covered
from .binding import binding_of
from .layers import is_experts, layer_number, recognise
from .module import ExpertyardExperts
from .outside import is_outside
from .state import Promise, Promised, promise_of

__all__ = ["LayerReport", "OtherReport", "VerifyReport", "verify"]


@dataclass(frozen=True)
class LayerReport:
    """The experts of one layer on one device: what runs them, and what is there."""

    layer: int
    name: str
    kernel: str
    device: str
    format: str
    num_experts: int
    nbytes: int


@dataclass(frozen=True)
class OtherReport:
    """Quantised layers that are no experts, of one format on one device. kernel: "torch" where
    their weights are made plain for each call."""

    kernel: str
    device: str
    format: str
    num_layers: int
    nbytes: int


@dataclass(frozen=True)
class VerifyReport:
    """Every experts layer of the model, and its other quantised layers; prints as a table."""

    layers: tuple[LayerReport, ...]
    others: tuple[OtherReport, ...] = ()

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
        for other in self.others:
            what = f"{other.num_layers} linear layers that are no experts"
            gib = f"{other.nbytes / 2**30:.3g}"
            table.add_row("", what, "", other.format, other.device, other.kernel, gib)
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def verify(model: Any) -> VerifyReport:
    """Runs a token through every part of every experts layer and reports what computed it.

    Raises VerifyError, naming every layer at fault, if a layer does not run on a kernel of ours, or
    not on the device and in the format of the plan, or if the plan and the model know different
    layers.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    promise = promise_of(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if is_experts(module) or is_outside(module) or isinstance(module, ExpertyardExperts)
    }
    if not modules:
        raise VerifyError(f"{type(model).__name__} has no experts layer that Expertyard knows.")
    promised = {layer.name: layer for layer in promise.layers} if promise is not None else {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    faults = [
        f"{name}: the plan has it, the model has no experts module there any more"
        for name in promised.keys() - modules.keys()
    ]
    reports: list[LayerReport] = []
    for name, module in modules.items():
        fault = _misplaced(name, module, promise, promised.get(name))
        if fault is None:
            result = _run_tokens(name, module, promised.get(name), dtype)
            if not isinstance(result, str):
                reports.extend(result)
                continue
            fault = result
        faults.append(f"{name}: {fault}")
    if faults:
        raise VerifyError(
            f"{len(faults)} of {len(modules)} experts layers are not as they should be:\n  "
            + "\n  ".join(faults)
        )
    others = _run_others(model, dtype)
    return VerifyReport(tuple(sorted(reports, key=lambda report: report.layer)), others)


def _run_others(model: nn.Module, dtype: torch.dtype) -> tuple[OtherReport, ...]:
    """Runs a token through every quantised layer that is no expert. Raises VerifyError."""
    found: dict[tuple[str, str, str], OtherReport] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        try:
            with torch.no_grad():
                row = torch.full((1, module.in_features), 0.5, dtype=dtype, device=module.device)
                module(row)
        except KernelError as error:
            raise VerifyError(f"{name}: it cannot run: {error}") from None
        key = (module.kernel(dtype), str(module.device), module.format)
        known = found.get(key, OtherReport(*key, 0, 0))
        found[key] = replace(
            known, num_layers=known.num_layers + 1, nbytes=known.nbytes + module.nbytes
        )
    return tuple(found.values())


def _misplaced(
    name: str, module: nn.Module, promise: Promise | None, promised: Promised | None
) -> str | None:
    """What is wrong with a module as it stands, before it runs."""
    if promise is not None and promised is None:
        return f"the plan does not have this layer, which {type(module).__name__} runs"
    if isinstance(module, ExpertyardExperts):
        return None if module.experts is not None else "it holds no weights: loading did not finish"
    if promise is not None and promise.road == "load":
        return f"it was replaced by {type(module).__name__} after loading"
    if promise is not None:
        if not covered(module):
            return f"its forward was replaced: {type(module).__name__} runs it, not Expertyard"
        home = str(next(module.parameters()).device)
        if promise.plan is not None and promised is not None and home != promised.home:
            return f"its weights were moved from {promised.home} to {home} after attach()"
        return None
    if is_outside(module):
        return (
            f"transformers runs {type(module).__name__}, which experts_implementation does not "
            "reach; load the model with quantization_config=expertyard.ExpertsConfig(), or call "
            "expertyard.attach(model)"
        )
    chosen = getattr(module.config, "_experts_implementation", None)
    if chosen != IMPLEMENTATION:
        return (
            f'it runs transformers\' "{chosen}"; call '
            f'model.set_experts_implementation("{IMPLEMENTATION}")'
        )
    return None


def _run_tokens(
    name: str, module: nn.Module, promised: Promised | None, dtype: torch.dtype
) -> list[LayerReport] | str:
    """A token for each part of the layer; the parts' reports, or what is wrong with the layer."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu")
    if parameter is not None and parameter.device.type != "meta":
        device, dtype = parameter.device, parameter.dtype
    try:
        layout = module.layout if isinstance(module, ExpertyardExperts) else recognise(module, name)
        before = _experts(module)
        parts = [] if before is None else before.parts
        first = [part.packed.here()[0] for part in parts] or [0]
        if before is not None and before.group is not None and promised is not None:
            # all processes must ask for the same
            assert promised.placement is not None
            first = [part.ids[0] for part in promised.placement.parts]
        ids = torch.tensor(first, device=device)[:, None]
        weights = torch.ones(ids.shape, dtype=dtype, device=device)
        shape = (len(first), layout.hidden_size)
        hidden_states = torch.full(shape, 0.5, dtype=dtype, device=device)
        calls = [part.packed.calls for part in parts]
        with torch.no_grad():
            module(hidden_states, ids, weights)
    except Exception as error:
        return f"it cannot run: {error}"
    experts = _experts(module)
    if experts is None:
        return "expected one call of a kernel of ours, counted 0"
    if experts is not before:  # packed anew, by this very call
        calls = [0] * len(experts.parts)
    found = []
    for part, called in zip(experts.parts, calls, strict=True):
        if part.packed.device.type == "cuda":
            torch.cuda.synchronize(part.packed.device)  # the count is taken when the kernel has run
        count = part.packed.calls - called
        kernel = "torch" if part.op == "torch" else part.packed.last_kernel
        expected = 0 if part.op == "torch" else 1
        if experts.group is not None:  # one call for other processes' tokens, one for its own
            count = min(count, expected)
        if kernel is None or count != expected:
            return f"expected one call of a kernel of ours, counted {count} (on {part.device})"
        found.append(
            LayerReport(
                layer=layer_number(name),
                name=name,
                kernel=kernel,
                device=part.device,
                format=part.packed.format,
                num_experts=len(part.packed.here()),
                nbytes=part.packed.nbytes,
            )
        )
    return _elsewhere(experts, promised) or found


def _elsewhere(experts: LayerExperts, promised: Promised | None) -> str | None:
    """The first expert that is not where, or not in the format, that the plan says."""
    if promised is None or promised.placement is None:
        return None
    own = (None, None if experts.group is None else experts.group.rank)
    for part in promised.placement.parts:
        if split_rank(part.device)[0] not in own:
            continue  # another process has these
        for expert in part.ids:
            wanted = experts.moved.get(expert, part.device)
            try:
                there = experts.part_of(expert)
            except PlanError as error:
                return str(error)
            if there.device != wanted:
                return f"the plan says {wanted}, its expert {expert} is on {there.device}"
            if there.packed.format != part.format:
                return f"the plan says {part.format}, its experts are {there.packed.format}"
            actual = _device_of_memory(there.packed)
            if actual != split_rank(wanted)[1]:
                return f"the plan says {wanted}, the memory of its experts is on {actual}"
    return None


def _device_of_memory(packed: PackedExperts) -> str:
    """Where the memory of the first expert really is."""
    gate = next(tensor for tensor in packed.expert(packed.here()[0]) or () if tensor is not None)
    return device_of(gate)


def _experts(module: nn.Module) -> LayerExperts | None:
    if isinstance(module, ExpertyardExperts):
        return module.experts
    binding = binding_of(module)
    return None if binding is None else binding.experts()
