# SPDX-License-Identifier: Apache-2.0
"""From a plan to the parts of each layer of experts: who is where, run by what. Pure.

The caller says which layers have experts and which devices exist. What cannot be obeyed is refused
with a sentence, never bent.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import DeviceError, PlanError
from ..plan import ExpertGroup, LayerPlan, Plan

__all__ = ["PartPlan", "Placement", "Prefill", "check_devices", "place_experts", "split_rank"]

_OPS = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")}  # device type -> what runs there
PLAIN = ("bf16", "fp16", "fp32")  # formats that plain PyTorch can multiply


@dataclass(frozen=True)
class Prefill:
    """What a rule wants for calls of many tokens: the weights are brought to `device` for them."""

    device: str
    op: str
    why: str


@dataclass(frozen=True)
class PartPlan:
    """Experts of one layer that share a fate. prefill None: nobody has said, measure and choose."""

    ids: tuple[int, ...]
    device: str
    format: str
    op: str
    why: str
    prefill: Prefill | None = None


@dataclass(frozen=True)
class Placement:
    """Where the experts of one layer live. home: where its hidden states are, and its result."""

    home: str
    parts: tuple[PartPlan, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.device for part in self.parts))

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.format for part in self.parts))

    def __str__(self) -> str:
        return ", ".join(f"{len(p.ids)} on {p.device} ({p.format})" for p in self.parts)


def split_rank(device: str) -> tuple[int | None, str]:
    """'rank1/cuda:0' -> (1, 'cuda:0'); 'cpu' -> (None, 'cpu'): of every process its own."""
    rank, slash, local = device.partition("/")
    return (int(rank[4:]), local) if slash and rank.startswith("rank") else (None, device)


def place_experts(
    plan: Plan, layers: Mapping[str, int], formats: Collection[str] | None = None
) -> dict[str, Placement]:
    """The placement of each experts module.

    layers   experts module -> its layer's number in the plan
    formats  those that experts can be packed in (None: any)
    Raises PlanError if the plan does not know a layer's experts, or asks for what is not supported.
    """
    planned = {layer.layer: layer for layer in plan.layers}
    placements = {name: _placement(name, planned.get(number)) for name, number in layers.items()}
    for name, placement in placements.items():
        for wanted in placement.formats:
            if formats is not None and wanted not in formats:
                raise PlanError(
                    f"Layer {layers[name]}: the plan wants its experts in format {wanted!r}. There "
                    f"is no kernel for it yet; choose one of {', '.join(formats)}."
                )
    return placements


def check_devices(
    plan: Plan, available: Collection[str], unusable: Mapping[str, str] | None = None
) -> None:
    """DeviceError if the plan names a device that is not in `available`.

    unusable  devices that are there but that no kernel can use, each with the reason
    Devices of other processes ("rank1/cpu") are theirs to check.
    """
    wanted: dict[str, str] = {}
    for layer in plan.layers:
        wanted.setdefault(layer.device, f"layer {layer.layer}")
        for group in layer.experts or ():
            wanted.setdefault(group.device, f"the experts of layer {layer.layer}")
            if prefill := getattr(group, "prefill_device", ""):
                wanted.setdefault(prefill, f"the prefill of layer {layer.layer}")
    for device, what in wanted.items():
        if device not in available and split_rank(device)[0] is None:
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
    parts: dict[PartPlan, list[int]] = {}
    reasons: dict[PartPlan, list[str]] = {}
    for group in layer.experts:
        part = _part(group, layer)
        parts.setdefault(part, []).extend(group.ids)
        reasons.setdefault(part, []).append(group.why)
    return Placement(
        layer.device,
        tuple(
            PartPlan(
                tuple(sorted(ids)), part.device, part.format, part.op,
                ", ".join(dict.fromkeys(reasons[part])), part.prefill,
            )
            for part, ids in parts.items()
        ),
    )  # fmt: skip


def _part(group: ExpertGroup, layer: LayerPlan) -> PartPlan:
    """The group without its ids and reason, so that equal ones come together."""
    kind = split_rank(group.device)[1].partition(":")[0]
    runs = _OPS.get(kind, ("torch",))
    if group.op not in runs:
        raise PlanError(
            f"Layer {layer.layer}: the plan runs its experts with op {group.op!r} on "
            f"{group.device}. There {' and '.join(map(repr, runs))} can run ({group.why})."
        )
    prefill = _prefill(group, layer)
    if group.format not in PLAIN and "torch" in (group.op, prefill.op if prefill else ""):
        raise PlanError(
            f"Layer {layer.layer}: op 'torch' is plain PyTorch, which multiplies "
            f"{', '.join(PLAIN)}, not {group.format} ({group.why}). Leave the op out, or choose "
            "one of these formats."
        )
    return PartPlan((), group.device, group.format, group.op, "", prefill)


def _prefill(group: ExpertGroup, layer: LayerPlan) -> Prefill | None:
    device: str = getattr(group, "prefill_device", "")
    op = group.prefill_op or group.op
    if op == group.op and device in ("", group.device):
        return None
    if split_rank(group.device)[0] is not None:
        raise PlanError(
            f"Layer {layer.layer}: experts on {group.device} have a prefill of their own "
            f"({group.why}). Between processes that is not supported: leave it out."
        )
    if not device:
        gpu = next((d for d in (group.device, layer.device) if d.startswith("cuda")), None)
        device = {"cuda": gpu, "cpu": "cpu"}.get(op) or ("" if op == "cuda" else group.device)
    kind = device.partition(":")[0]
    if op == group.op and op != "torch":
        op = kind  # the rule names a device only: its own op runs there
    if op not in _OPS.get(kind, ()):
        where = device or f"{group.device} (the layer is on {layer.device})"
        raise PlanError(
            f"Layer {layer.layer}: the plan runs its prefill with op {op!r} on {where}, where it "
            f"does not run ({group.why}). Change prefill_op or prefill_device."
        )
    return Prefill(device, op, group.why)
