# SPDX-License-Identifier: Apache-2.0
"""How a real GPU asks the CPU for its part of a layer: buffers in pinned memory, one set for each
GPU and shape of call, shared by the layers of one model and by nobody else.

The kernels and the lane that answers are native (csrc/cuda/handoff.h, csrc/handoff/desk.h).
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError, KernelError
from ..native import _C
from ..ops import ask_cpu, collect_cpu
from ..weights import PackedExperts
from .options import RunOptions

__all__ = ["Desks"]


class Desks:
    """A model's. A CUDA graph that was captured with them must not be replayed when they are gone:
    they live as long as the model's layers."""

    def __init__(self) -> None:
        self._desks: dict[tuple[Any, ...], int] = {}

    def ask(
        self,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        experts: PackedExperts,
        options: RunOptions,
    ) -> "Asked":
        """Queues the question on the current stream. DeviceError, KernelError: what went wrong
        with an earlier one, or there is no pinned memory."""
        desk = self._desk(hidden, ids.shape[1], options)
        return Asked(desk, ask_cpu(hidden, ids, weights, experts, desk))

    def check(self) -> None:
        """Raises what went wrong with a question of a graph; call torch.cuda.synchronize() before
        to be sure of the answer. The values of such a question's result are NaN."""
        for desk in self._desks.values():
            try:
                _C.check_desk(desk)
            except ValueError as error:
                sentence = str(error)
                if sentence.startswith("device: "):
                    raise DeviceError(sentence.removeprefix("device: ") + ".") from None
                raise KernelError(sentence) from None

    def _desk(self, hidden: Tensor, top_k: int, options: RunOptions) -> int:
        by_host = options.handoff == "host"
        dtype = str(hidden.dtype).removeprefix("torch.")
        key = (hidden.device, *hidden.shape, top_k, dtype, by_host, options.timeout)
        desk = self._desks.get(key)
        if desk is None:
            num_tokens, hidden_size = hidden.shape
            device = hidden.device.index
            try:
                desk = _C.add_desk(
                    device, num_tokens, hidden_size, top_k, dtype,
                    torch.get_num_threads(), options.timeout, by_host,
                )  # fmt: skip
            except ValueError as error:
                raise DeviceError(f"{hidden.device}: {error}.") from None
            self._desks[key] = desk
        return desk

    def __del__(self) -> None:
        for desk in self.__dict__.pop("_desks", {}).values():
            _C.remove_desk(desk)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Desks":
        memo[id(self)] = twin = Desks()
        return twin


class Asked:
    """A question that is under way."""

    def __init__(self, desk: int, ticket: Tensor) -> None:
        self._desk, self._ticket = desk, ticket

    def collect(self, share: Tensor | None) -> Tensor:
        """Queues the sum of the answer and the GPU's own share (float32), rounded once."""
        if share is None:
            share = self._ticket.new_empty(0, dtype=torch.float32)
        return collect_cpu(self._ticket, share, self._desk)
