# SPDX-License-Identifier: Apache-2.0
"""Which experts have a GPU's slots while a model runs: those that were needed last, or most.

A layer's slots are as many as the plan gave it GPU experts. After each call of a layer, experts
that were asked for and are on the CPU come in, and others go out. A static layer has no policy at
all: its calls are the same instructions, and so the same bits, as if this file did not exist.
"""

import torch
from torch import Tensor

from .layer import LayerExperts, Part

__all__ = ["Frequency", "LruSlots", "Policy", "make_policy"]

FEW_TOKENS = 16  # a prompt asks for nearly every expert: it says nothing about the next step
HALF_LIFE = 256  # calls after which a choice counts half (frequency)
PERIOD = 16  # calls between two looks at the counts (frequency)
MARGIN = 1.5  # an expert comes in if it is this much more popular than the one that goes


class Policy:
    """Called after each call of its layer."""

    def __init__(self, layer: LayerExperts) -> None:
        self.moves = 0

    def __call__(self, layer: LayerExperts, topk_ids: Tensor) -> None:
        raise NotImplementedError

    def swap(self, layer: LayerExperts, gpu: Part, coming: int, going: int) -> None:
        """The one that goes makes room first, so that slots never are more than planned."""
        device = gpu.device
        layer.move(going, "cpu")
        layer.move(coming, device)
        self.moves += 2


class LruSlots(Policy):
    """Slots for the experts that were needed last."""

    def __init__(self, layer: LayerExperts) -> None:
        super().__init__(layer)
        self.last: dict[int, int] = {}
        self.now = 0

    def __call__(self, layer: LayerExperts, topk_ids: Tensor) -> None:
        if topk_ids.shape[0] > FEW_TOKENS:
            return
        self.now += 1
        used = [e for e in dict.fromkeys(topk_ids.flatten().tolist()) if e >= 0]
        used = [e for e in used if e < layer.num_experts]
        for expert in used:
            self.last[expert] = self.now
        for expert in used:
            if not layer.part_of(expert).is_cpu:
                continue
            slots = [(self.last.get(e, 0), e, p) for p in _gpus(layer) for e in p.packed.here()]
            if not slots:
                return
            age, going, part = min(slots, key=lambda slot: slot[:2])
            if age < self.now:  # else every slot is needed by this very call
                self.swap(layer, part, expert, going)


class Frequency(Policy):
    """Slots for the experts that are needed most, by counts that fade."""

    def __init__(self, layer: LayerExperts) -> None:
        super().__init__(layer)
        self.counts = torch.zeros(layer.num_experts)
        self.calls = 0

    def __call__(self, layer: LayerExperts, topk_ids: Tensor) -> None:
        if topk_ids.shape[0] > FEW_TOKENS:
            return
        ids = topk_ids.flatten().to("cpu", torch.int64)
        ids = ids[(ids >= 0) & (ids < layer.num_experts)]
        self.counts.mul_(0.5 ** (1 / HALF_LIFE)).index_add_(0, ids, torch.ones(len(ids)))
        self.calls += 1
        if self.calls % PERIOD:
            return
        counts = self.counts.tolist()
        for part in _gpus(layer):
            outside = [e for p in layer.parts if p.is_cpu for e in p.packed.here()]
            if not outside:
                return
            coming = max(outside, key=lambda e: (counts[e], -e))
            going = min(part.packed.here(), key=lambda e: (counts[e], -e))
            if counts[coming] > MARGIN * counts[going]:
                self.swap(layer, part, coming, going)


def _gpus(layer: LayerExperts) -> list[Part]:
    return [part for part in layer.parts if not part.is_cpu and part.device == part.local]


def make_policy(name: str, layer: LayerExperts) -> Policy | None:
    """The layer's policy; None for "static", and where there is nothing to choose."""
    kinds: dict[str, type[Policy]] = {"lru": LruSlots, "frequency": Frequency}
    if name not in kinds or not _gpus(layer) or all(not part.is_cpu for part in layer.parts):
        return None
    return kinds[name](layer)
