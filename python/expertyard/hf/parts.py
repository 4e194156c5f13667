# SPDX-License-Identifier: Apache-2.0
"""One layer's experts by the plan, from where they are: a checkpoint (road A), or the parameters of
a module in memory (road C).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dispatch import LayerExperts, Placement, RunOptions, build, spread
from ..loading import DTYPES, Checkpoint, ExpertsLayout, LayerSource, Whole, assemble
from ..loading.in_memory import InMemory
from ..loading.packed_folder import PackedFolder
from ..modes import default_mode, has_fast
from ..weights import PackedExperts
from .state import Promised

__all__ = ["experts_of_tensors", "load_experts", "map_experts"]


def load_experts(
    checkpoint: Checkpoint,
    source: LayerSource,
    promised: Promised,
    options: RunOptions,
    shared: Any = None,
    advance: Callable[[int], None] | None = None,
) -> LayerExperts:
    """The experts of one layer of a checkpoint, each part on its device. LoadError, PlanError.

    advance  called with the bytes of the files that have been read
    """
    assert promised.placement is not None

    def fetch(ids: Sequence[int], format: str, device: str) -> PackedExperts:
        return assemble(
            checkpoint,
            source,
            format=format,
            device=device,
            search=options.search,
            mode=_mode(options, format, device),
            experts=None if len(ids) == source.layout.num_experts else ids,
            advance=advance,
        )

    group = None if shared is None else shared.for_layer(promised.placement)
    return build(promised.placement, fetch, layer=promised.layer, options=options, group=group)


def map_experts(
    folder: PackedFolder, promised: Promised, options: RunOptions, shared: Any = None
) -> LayerExperts:
    """The same from a folder of `expertyard pack`: what stays on the CPU is mapped."""
    assert promised.placement is not None

    def fetch(ids: Sequence[int], format: str, device: str) -> PackedExperts:
        mode = _mode(options, format, device)
        if len(ids) == promised.layout.num_experts:
            return folder.experts(promised.name, promised.layout, device, mode=mode)
        mapped = _mode(options, format, "cpu")
        packed = folder.experts(promised.name, promised.layout, "cpu", mode=mapped)
        part = spread(packed, [(ids, device)])[0]
        return part if mode == mapped else part.in_mode(mode)

    group = None if shared is None else shared.for_layer(promised.placement)
    return build(promised.placement, fetch, layer=promised.layer, options=options, group=group)


def _mode(options: RunOptions, format: str, device: str) -> str:
    """The mode asked for, where the format has it: formats without 8-bit kernels are exact."""
    if options.mode == "auto" or not (has_fast(format) or has_fast(format, device)):
        return default_mode(format)
    return options.mode


def experts_of_tensors(
    layout: ExpertsLayout,
    tensors: dict[str, Tensor],
    placement: Placement,
    *,
    layer: int,
    options: RunOptions,
) -> LayerExperts:
    """The same from parameters whose rows a kernel can read: gate_up_proj [E, 2I, H], down_proj
    [E, H, I] and their biases. What stays on its device in its dtype is used in place."""
    whole: dict[str, PackedExperts] = {}

    def fetch(ids: Sequence[int], format: str, device: str) -> PackedExperts:
        if format not in DTYPES:
            rows = replace(layout, transposed=False)  # the caller has turned them round
            return assemble(
                InMemory(tensors, "experts"),
                LayerSource("experts", rows, {name: Whole(name) for name in tensors}),
                format=format,
                device=device,
                search=options.search,
                mode=_mode(options, format, device),
                experts=None if len(ids) == layout.num_experts else ids,
            )
        if len(ids) == layout.num_experts:
            return _in_dtype(layout, tensors, DTYPES[format], device)
        if format not in whole:
            here = str(tensors["gate_up_proj"].device)
            whole[format] = _in_dtype(layout, tensors, DTYPES[format], here)
        return spread(whole[format], [(ids, device)])[0]

    return build(placement, fetch, layer=layer, options=options)


def _in_dtype(
    layout: ExpertsLayout, tensors: dict[str, Tensor], dtype: torch.dtype, device: str
) -> PackedExperts:
    """No copy where device and dtype already are the plan's."""
    biases = {
        name: tensors[key].to(device)
        for name, key in (("gate_up_bias", "gate_up_proj_bias"), ("down_bias", "down_proj_bias"))
        if key in tensors
    }
    return PackedExperts.from_tensors(
        tensors["gate_up_proj"].to(device, dtype),
        tensors["down_proj"].to(device, dtype),
        activation=layout.activation,
        interleaved=layout.interleaved,
        alpha=layout.alpha,
        limit=layout.limit,
        **biases,
    )
