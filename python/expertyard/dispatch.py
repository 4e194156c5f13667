# SPDX-License-Identifier: Apache-2.0
"""From a plan to one device and format per layer of experts: what of a plan can be obeyed here.

Pure: the caller says which layers have experts and which devices exist. Today the experts of a
layer stay together; a plan that parts them is refused with a sentence, never bent.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .errors import DeviceError, PlanError
from .plan import LayerPlan, Plan

__all__ = ["Placement", "check_devices", "place_experts"]

_OPS = {"cpu": "cpu", "cuda": "cuda"}  # device type -> the op that runs there


@dataclass(frozen=True)
class Placement:
    """Where all experts of one layer live, and in which format."""

    device: str
    format: str


def place_experts(
    plan: Plan, layers: Mapping[str, int], formats: Collection[str]
) -> dict[str, Placement]:
    """The placement of each experts module.

    layers   experts module -> its layer's number in the plan
    formats  those that experts can be packed in
    Raises PlanError if the plan does not know a layer's experts, or asks for what is not supported.
    """
    planned = {layer.layer: layer for layer in plan.layers}
    placements = {name: _placement(name, planned.get(number)) for name, number in layers.items()}
    for name, placement in placements.items():
        if placement.format not in formats:
            raise PlanError(
                f"Layer {layers[name]}: the plan wants its experts in format {placement.format!r}. "
                f"There is no kernel for it yet; choose one of {', '.join(formats)}."
            )
    _note_prefill(planned[number] for number in layers.values())
    return placements


def check_devices(
    plan: Plan, available: Collection[str], unusable: Mapping[str, str] | None = None
) -> None:
    """DeviceError if the plan names a device that is not in `available`.

    unusable  devices that are there but that no kernel can use, each with the reason
    """
    wanted: dict[str, str] = {}
    for layer in plan.layers:
        wanted.setdefault(layer.device, f"layer {layer.layer}")
        for group in layer.experts or ():
            wanted.setdefault(group.device, f"the experts of layer {layer.layer}")
    for device, what in wanted.items():
        if device not in available:
            reason = (unusable or {}).get(device)
            why = f"cannot be used ({reason})" if reason else "is not on this machine"
            raise DeviceError(
                f"The plan puts {what} on {device}, which {why}. Here there is "
                f"{', '.join(sorted(available))}. Change rules, layers or memory so that they name "
                "this only, or leave them out: Expertyard then places the model on what is there."
            )


def _placement(name: str, layer: LayerPlan | None) -> Placement:
    if layer is None or layer.experts is None:
        what = "has no such layer" if layer is None else "says that this layer has no experts"
        raise PlanError(
            f"{name}: the plan {what}, but the model has experts there. The plan was made for "
            "another model; plan again from this model's config.json."
        )
    placements = {Placement(group.device, group.format) for group in layer.experts}
    if len(placements) > 1:
        places = ", ".join(sorted(f"{p.device} ({p.format})" for p in placements))
        raise PlanError(
            f"Layer {layer.layer}: the plan parts its experts over {places}. That is not supported "
            "yet: the experts of one layer stay together. Place whole layers."
        )
    for group in layer.experts:
        runs = _OPS.get(group.device.partition(":")[0])
        if group.op != runs:
            raise PlanError(
                f"Layer {layer.layer}: the plan runs its experts with op {group.op!r} on "
                f"{group.device}. There only op {runs!r} is supported yet ({group.why})."
            )
    return placements.pop()


def _note_prefill(layers: Iterable[LayerPlan]) -> None:
    """Says where a plan's prefill_op is not used; the result is the same, only not its speed."""
    groups = [group for layer in layers for group in layer.experts or ()]
    others = sorted({g.prefill_op for g in groups if g.prefill_op not in ("", g.op)})
    if others:
        warnings.warn(
            f"prefill_op {', '.join(map(repr, others))} is not used: the kernel that generates "
            "also runs the prompt, with the same result. Leave prefill_op out.",
            stacklevel=2,
        )
