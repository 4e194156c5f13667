# SPDX-License-Identifier: Apache-2.0
"""Makes a layer's experts by their placement: each part is fetched, and put on its device.

Where a GPU has no room and the options allow it, what does not fit goes to the CPU, and is said.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import virtual
from ..errors import PlanError
from ..weights import PackedExperts
from .copies import spread
from .crossover import choose
from .layer import LayerExperts
from .options import RunOptions
from .placement import PartPlan, Placement, split_rank

__all__ = ["build"]

# (ids, format, device "cpu" or a real "cuda:N") -> these experts there
Fetch = Callable[[Sequence[int], str, str], PackedExperts]


def build(
    placement: Placement,
    fetch: Fetch,
    *,
    layer: int = 0,
    options: RunOptions | None = None,
    group: Any = None,
) -> LayerExperts:
    """The experts of one layer, by `placement`; of other processes' parts nothing is fetched.

    Raises PlanError with bytes and a suggestion if a GPU has no room for its experts.
    """
    options = options or RunOptions()
    rank = None if group is None else group.rank
    own = [part for part in placement.parts if split_rank(part.device)[0] in (None, rank)]
    planned = {expert: part.device for part in own for expert in part.ids}
    parts: list[tuple[PartPlan, PackedExperts]] = []
    on_cpu: list[PartPlan] = []
    for part in own:
        local = split_rank(part.device)[1]
        if local == "cpu":
            on_cpu.append(part)
            continue
        packed = _on_gpu(part, local, fetch, layer, options)
        there = packed.here() if packed is not None else ()
        if packed is not None:
            parts.append((part, packed))
        if left := tuple(expert for expert in part.ids if expert not in there):
            device = part.device.replace(local, "cpu")
            plain = part.op == "torch"
            on_cpu.append(replace(part, ids=left, device=device, op="torch" if plain else "cpu"))
    for part in _merged(on_cpu):
        parts.append((part, fetch(part.ids, part.format, "cpu")))
    made = LayerExperts(
        Placement(placement.home, tuple(part for part, _ in parts)),
        [packed for _, packed in parts],
        layer=layer,
        options=options,
        group=group,
    )
    made.moved = {
        expert: part.device
        for part, packed in parts
        for expert in packed.here()
        if planned[expert] != part.device
    }
    choose(made)
    return made


def _on_gpu(
    part: PartPlan, device: str, fetch: Fetch, layer: int, options: RunOptions
) -> PackedExperts | None:
    """As many of the part's experts as there is room for; None: for none."""
    ids = list(part.ids)
    while ids:
        try:
            if virtual.gpu(device) is None:
                return fetch(ids, part.format, device)
            return spread(fetch(ids, part.format, "cpu"), [(ids, device)])[0]
        except torch.OutOfMemoryError as error:
            if options.out_of_memory != "cpu":
                problem = str(error).partition("\n")[0]
                raise PlanError(
                    f"Layer {layer}: {device} has no room for its {len(part.ids)} experts: "
                    f"{problem} Leave it more room with memory or mb_resrv_per_gpu, or let experts "
                    "go to the CPU: ExpertsConfig(out_of_memory='cpu')."
                ) from None
            ids = ids[: len(ids) // 2]
            warnings.warn(
                f"Layer {layer}: {device} has no room for its {len(part.ids)} experts; "
                f"{len(part.ids) - len(ids)} of them stay on the CPU.",
                stacklevel=2,
            )
    return None


def _merged(parts: list[PartPlan]) -> list[PartPlan]:
    """Parts of one device and format in one."""
    found: dict[tuple[str, str, str], PartPlan] = {}
    for part in parts:
        key = part.device, part.format, part.op
        if key in found:
            part = replace(found[key], ids=tuple(sorted((*found[key].ids, *part.ids))))
        found[key] = part
    return list(found.values())
