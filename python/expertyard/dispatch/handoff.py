# SPDX-License-Identifier: Apache-2.0
"""How a real GPU asks others for their parts of a layer, with buffers that the layers of one model
share and nobody else does. The CPU: in pinned memory, one set for each GPU and shape of call; in
CUDA graphs other GPUs too: one set for each graph.

The kernels and the lane that answers are native (csrc/cuda/handoff.h, csrc/handoff/desk.h,
csrc/handoff/away.h).
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError, KernelError
from ..native import _C
from ..ops import ask_cpu, collect_away, collect_cpu, send_away
from ..weights import PackedExperts
from .options import RunOptions

__all__ = ["Desks"]


class Desks:
    """A model's. A CUDA graph that was captured with them must not be replayed when they are gone:
    they live as long as the model's layers."""

    def __init__(self) -> None:
        self._desks: dict[tuple[Any, ...], int] = {}
        self._aways: dict[tuple[Any, ...], int] = {}

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

    def send(self, hidden: Tensor, ids: Tensor, weights: Tensor, experts: PackedExperts) -> "Sent":
        """Queues the question to the GPU that has `experts`. Only while a graph is captured."""
        inputs = hidden.contiguous(), ids.contiguous(), weights.contiguous()
        away = self._away(*inputs, experts.device)
        return Sent(away, inputs, send_away(*inputs, experts, away))

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
        dtype = _name(hidden.dtype)
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

    def _away(self, hidden: Tensor, ids: Tensor, weights: Tensor, there: torch.device) -> int:
        home = hidden.device.index
        stream = torch.cuda.current_stream(hidden.device).cuda_stream
        # torch's memory of a graph is on one device; what the other one needs is the graph's own
        graph = _C.capture_id(home, stream)
        num_tokens, hidden_size = hidden.shape
        shape = num_tokens, hidden_size, ids.shape[1]
        dtypes = _name(hidden.dtype), _name(weights.dtype), ids.dtype == torch.int64
        key = (graph, home, there.index, shape, dtypes)
        if key not in self._aways:
            self._aways[key] = _C.add_away(home, there.index, *shape, *dtypes)
        return self._aways[key]

    def __del__(self) -> None:
        for away in self.__dict__.pop("_aways", {}).values():
            _C.remove_away(away)
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


class Sent:
    """A question to another GPU that is under way."""

    def __init__(self, away: int, inputs: tuple[Tensor, ...], arrived: Tensor) -> None:
        self._away, self._arrived = away, arrived
        self._inputs = inputs  # the other GPU copies them when it comes to it

    def collect(self) -> Tensor:
        """That GPU's share, float32, for what is queued from now on."""
        collect_away(self._arrived, self._away)
        return self._arrived


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
