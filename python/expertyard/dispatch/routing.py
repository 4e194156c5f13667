# SPDX-License-Identifier: Apache-2.0
"""What the routers chose: recorded while a model runs, saved as the profile or the trace that
`expertyard plan --profile FILE` reads.

Recording is keeping a reference to each call's topk_ids; counting is done when somebody asks, or
when many ids have been kept. So it costs a fraction of a microsecond a call.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["RoutingRecord"]

KEEP = 4096  # calls of a layer whose ids are kept before they are counted


class RoutingRecord:
    """Choices by layer. observe() is called for every call of every layer.

    traces  False: only counts are kept, so memory does not grow
    """

    def __init__(self, num_experts: dict[int, int], *, traces: bool = True) -> None:
        self.traces = traces
        self._num_experts = num_experts
        self._new: dict[int, list[Tensor]] = {layer: [] for layer in num_experts}
        self._counts = {
            layer: torch.zeros(n, dtype=torch.int64) for layer, n in num_experts.items()
        }
        self._tokens: dict[int, list[list[int]]] = {layer: [] for layer in num_experts}

    def observe(self, layer: int, topk_ids: Tensor) -> None:
        new = self._new[layer]
        new.append(topk_ids)
        if len(new) >= KEEP:
            self._count(layer)

    def counts(self) -> dict[int, list[int]]:
        """Layer -> how often each expert was chosen."""
        for layer in self._new:
            self._count(layer)
        return {layer: counts.tolist() for layer, counts in self._counts.items()}

    def tokens(self) -> list[list[list[int]]]:
        """[[expert ids] per MoE layer] per token, as far as all layers have seen them."""
        for layer in self._new:
            self._count(layer)
        return [list(token) for token in zip(*self._tokens.values(), strict=False)]

    def save(self, path: str | Path) -> None:
        """Writes {"counts": {layer: [...]}}, with traces {"tokens": [...], "counts": ...}: both
        serve --profile, the latter --strategy trace too. Raises ConfigError."""
        data: dict[str, Any] = {"counts": {str(k): v for k, v in self.counts().items()}}
        if self.traces:
            data = {"tokens": self.tokens(), **data}
        try:
            Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from None

    def _count(self, layer: int) -> None:
        new, self._new[layer] = self._new[layer], []
        if not new:
            return
        number = self._num_experts[layer]
        by_device = [ids.detach().to("cpu", torch.int64) for ids in new]
        for ids in by_device:
            chosen = ids[(ids >= 0) & (ids < number)]
            self._counts[layer] += torch.bincount(chosen.flatten(), minlength=number)
            if self.traces:
                rows = [[e for e in row if 0 <= e < number] for row in ids.tolist()]
                self._tokens[layer].extend(rows)
