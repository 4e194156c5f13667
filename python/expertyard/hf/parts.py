# SPDX-License-Identifier: Apache-2.0
"""One layer's experts by the plan, from where they are: a checkpoint (road A), or the parameters of
a module in memory (road C).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import LayerExperts, Placement, RunOptions, build, spread
from ..loading import DTYPES, Checkpoint, ExpertsLayout, LayerSource, assemble
from ..packing import ExpertPacker
from ..reference import split_gate_up
from ..weights import PackedExperts
from .state import Promised

__all__ = ["experts_of_tensors", "load_experts"]


def load_experts(
    checkpoint: Checkpoint,
    source: LayerSource,
    promised: Promised,
    options: RunOptions,
    shared: Any = None,
) -> LayerExperts:
    """The experts of one layer of a checkpoint, each part on its device. LoadError, PlanError."""
    assert promised.placement is not None

    def fetch(ids: Sequence[int], format: str, device: str) -> PackedExperts:
        if len(ids) == source.layout.num_experts:
            return assemble(checkpoint, source, format=format, device=device)
        packed = assemble(checkpoint, source, format=format, device="cpu")
        return spread(packed, [(ids, device)])[0]

    group = None if shared is None else shared.for_layer(promised.placement)
    return build(promised.placement, fetch, layer=promised.layer, options=options, group=group)


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
            return _pack(layout, tensors, ids, format, device)
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


def _pack(
    layout: ExpertsLayout, tensors: dict[str, Tensor], ids: Sequence[int], format: str, device: str
) -> PackedExperts:
    """Quantised, expert by expert."""
    packer = ExpertPacker(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        format,
        device=device,
        activation=layout.activation,
        alpha=layout.alpha,
        limit=layout.limit,
        has_bias=layout.has_bias,
    )
    gate, up = split_gate_up(tensors["gate_up_proj"], layout.interleaved)
    for expert in ids:
        biases: dict[str, Any] = {}
        if layout.has_bias:
            row = tensors["gate_up_proj_bias"][expert : expert + 1]
            gate_bias, up_bias = split_gate_up(row, layout.interleaved)
            biases = {
                "gate_bias": gate_bias[0],
                "up_bias": up_bias[0],
                "down_bias": tensors["down_proj_bias"][expert],
            }
        packer.put(expert, gate[expert], up[expert], tensors["down_proj"][expert], **biases)
    return packer.finish()
