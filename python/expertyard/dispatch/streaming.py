# SPDX-License-Identifier: Apache-2.0
"""Experts that come to a device for one call: their weights, in chunks, by way of two areas there.

While the arithmetic of one chunk runs, the next one is on its way into the other area. On a GPU
nothing but events keeps the order, and the host runs ahead:

    copy stream     | chunk 0 | chunk 1 | (chunk 0's arithmetic) chunk 2 | ...
    current stream            | arithmetic 0 | (chunk 1) arithmetic 1 | ...

Weights in RAM are staged in pinned memory, of which there are two areas too. A virtual GPU does the
same with a thread for the copy stream, and checks the order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import virtual
from ..devices import torch_device
from ..errors import DeviceError
from ..weights import Expert, PackedExperts
from .copies import multiply
from .lanes import Ticket, submit

__all__ = ["CHUNK_BYTES", "stream"]

CHUNK_BYTES = 128 << 20  # of an area, unless one expert alone is larger
_ALIGNMENT = 256  # bytes, of each tensor in an area: what kernels ask for and more


def stream(
    packed: PackedExperts, device: str, op: str, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """What these experts add, computed on `device`, to which their weights come for this call.

    hidden, ids and weights are there; so is the result, [num_tokens, hidden_size] float32.
    Raises torch.OutOfMemoryError if the device has no room for two chunks.
    """
    if device == "cpu" and packed.device.type == "cpu":  # they are there
        return multiply(packed, op, hidden, ids, weights)
    named = set(ids.unique().tolist())
    wanted = [expert for expert in packed.here() if expert in named]
    total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    if not wanted:
        return total
    chunks = _chunks(packed, wanted)
    link = _link(device, max(sum(_size(packed, e) for e in chunk) for chunk in chunks), len(chunks))
    try:
        there = packed.holding(
            {
                e: tensors
                for i, ids_ in enumerate(chunks)
                for e, tensors in link.lay(packed, ids_, i)
            }
        )
        link.bring(0)
        for i, chunk in enumerate(chunks):
            if i + 1 < len(chunks):
                link.bring(i + 1)
            link.wait(i)
            # all rows of the table are filled, but only this chunk's weights are there
            here = ids if len(chunks) == 1 else _only(ids, chunk, packed.num_experts)
            total += multiply(there, op, hidden, here, weights)
            link.used(i)
    finally:
        link.end()
    return total


def _chunks(packed: PackedExperts, wanted: Sequence[int]) -> list[list[int]]:
    """In order, each within CHUNK_BYTES unless it is one expert."""
    found: list[list[int]] = []
    size = 0
    for expert in wanted:
        more = _size(packed, expert)
        if not found or size + more > CHUNK_BYTES:
            found.append([])
            size = 0
        found[-1].append(expert)
        size += more
    return found


def _size(packed: PackedExperts, expert: int) -> int:
    """Bytes of an expert in an area."""
    return sum(_padded(tensor) for tensor in _distinct(packed, expert))


def _distinct(packed: PackedExperts, expert: int) -> list[Tensor]:
    """Gate and up may be one blob."""
    return list({id(t): t for t in packed.expert(expert) or () if t is not None}.values())


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _only(ids: Tensor, chunk: list[int], num_experts: int) -> Tensor:
    """The ids with -1 for experts of other chunks. Ids that name no expert stay: they are errors,
    or mean none."""
    is_other = torch.ones(num_experts, dtype=torch.bool)
    is_other[chunk] = False
    is_other = is_other.to(ids.device)
    named = (ids >= 0) & (ids < num_experts)
    return ids.masked_fill(named & is_other[ids.clamp(0, num_experts - 1).long()], -1)


class _Link:
    """Two areas on a device, and what is copied into them. Here: at once, by whoever asks.

    bring(i) begins to copy chunk i; wait(i): what is queued after this finds it; used(i): what was
    queued before this has been the last to look at it, so that chunk i + 2 may come.
    """

    def __init__(self, device: str, size: int, chunks: int) -> None:
        self.device = device
        self._areas = [self._area(size) for _ in range(min(2, chunks))]
        self._copies: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(chunks)]

    def _area(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=torch_device(self.device))

    def lay(
        self, packed: PackedExperts, chunk: Sequence[int], number: int
    ) -> list[tuple[int, Expert]]:
        """Where the chunk's experts will be: views of an area."""
        area, begin = self._areas[number % 2], 0
        found: list[tuple[int, Expert]] = []
        for expert in chunk:
            views: dict[int, Tensor] = {}
            for tensor in _distinct(packed, expert):
                size = tensor.numel() * tensor.element_size()
                view = area[begin : begin + size].view(tensor.dtype).view(tensor.shape)
                views[id(tensor)] = self._mark(view)
                self._copies[number].append((view, tensor))
                begin += _padded(tensor)
            tensors = packed.expert(expert) or ()
            found.append((expert, tuple(None if t is None else views[id(t)] for t in tensors)))
        return found

    def _mark(self, view: Tensor) -> Tensor:
        return virtual.mark(view, self.device) if virtual.number() else view

    def bring(self, number: int) -> None:
        for view, tensor in self._copies[number]:
            view.copy_(tensor)

    def wait(self, number: int) -> None:
        pass

    def used(self, number: int) -> None:
        pass

    def end(self) -> None:
        """No copy is under way any more that what is queued after this could disturb."""


class _CudaLink(_Link):
    """By a stream of its own."""

    def __init__(self, device: str, size: int, chunks: int) -> None:
        super().__init__(device, size, chunks)
        self._current = torch.cuda.current_stream(device)
        self._stream = _copy_stream(device)
        self._stream.wait_stream(self._current)  # which may still use what the areas were before
        self._staged = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in self._areas]
        self._arrived = [torch.cuda.Event() for _ in range(chunks)]
        self._read = [torch.cuda.Event() for _ in range(chunks)]

    def bring(self, number: int) -> None:
        if number >= 2:
            self._arrived[number - 2].synchronize()  # the host writes where it came from
            self._stream.wait_event(self._read[number - 2])
        area, staged = self._areas[number % 2], self._staged[number % 2]
        end = 0
        with torch.cuda.stream(self._stream):
            for view, tensor in self._copies[number]:
                if tensor.device.type != "cpu":  # from another GPU
                    view.copy_(tensor, non_blocking=True)
                    continue
                size = tensor.numel() * tensor.element_size()
                begin = view.data_ptr() - area.data_ptr()
                staged[begin : begin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
                end = max(end, begin + size)
            if end:
                area[:end].copy_(staged[:end], non_blocking=True)
            self._arrived[number].record(self._stream)

    def wait(self, number: int) -> None:
        self._current.wait_event(self._arrived[number])

    def used(self, number: int) -> None:
        self._read[number].record(self._current)

    def end(self) -> None:
        self._current.wait_stream(self._stream)


class _VirtualLink(_Link):
    """By a thread; whoever breaks the order hears of it, or reads NaN."""

    def __init__(self, device: str, size: int, chunks: int) -> None:
        super().__init__(device, size, chunks)
        self._tickets: dict[int, Ticket] = {}
        self._is_read = [False] * chunks

    def _area(self, size: int) -> Tensor:
        gpu = virtual.gpu(self.device)
        assert gpu is not None
        return virtual.mark(gpu.own(torch.empty(size, dtype=torch.uint8).fill_(255)), gpu)

    def bring(self, number: int) -> None:
        self._check(number < 2 or self._is_read[number - 2], number, "came too early")
        self._tickets[number] = submit(f"copies to {self.device}", super().bring, number)

    def wait(self, number: int) -> None:
        self._check(number in self._tickets, number, "was not brought")
        self._tickets[number].wait(3600, f"chunk {number} of the weights")  # the call has a limit

    def used(self, number: int) -> None:
        self._areas[number % 2].fill_(255)  # NaN, in most formats
        self._is_read[number] = True

    def end(self) -> None:
        for ticket in self._tickets.values():
            ticket.join(3600)
        self._tickets.clear()  # which know this link: its memory is to go with it

    def _check(self, is_right: bool, number: int, what: str) -> None:
        if not is_right:
            raise DeviceError(
                f"{self.device}: chunk {number} of weights that are brought for a call {what}. "
                "This is a fault of Expertyard; please report it."
            )


def _link(device: str, size: int, chunks: int) -> _Link:
    kind: Any = _Link
    if device != "cpu":
        kind = _CudaLink if virtual.gpu(device) is None else _VirtualLink
    link: _Link = kind(device, size, chunks)
    return link


_streams: dict[str, Any] = {}


def _copy_stream(device: str) -> Any:
    return _streams.setdefault(device, _streams.get(device) or torch.cuda.Stream(device))
