# SPDX-License-Identifier: Apache-2.0
"""Experts of one layer in several processes, by torch.distributed (gloo or nccl; `torchrun`).

A plan names the devices of process N "rankN/cpu" and "rankN/cuda:0"; a device without a rank is
each process's own. Every process runs the whole model but only its experts. Two ways of working:

tokens="same"  all processes have the same tokens (the same prompt; attention is computed by each).
               Each computes its experts' share of every token. Shares meet by an all-reduce of
               [num_tokens, hidden_size], or by sending only rows that have a share: a token whose
               experts are in one process has one such row.
tokens="own"   each process has a batch of its own. Tokens travel to the processes that have their
               experts and back (all-to-all), or everything to everyone.

The way that moves fewer bytes is taken, call by call; all processes know enough to agree on it.
Sums are in float32, in the order of ranks, so that all processes get the same bits.
"""

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DeviceError, KernelError
from .layer import LayerExperts
from .options import RunOptions
from .placement import Placement, split_rank

__all__ = ["Group", "join", "ranks_of"]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def ranks_of(placements: list[Placement]) -> set[int]:
    """The processes that a plan names."""
    ranks = {split_rank(part.device)[0] for p in placements for part in p.parts}
    return {rank for rank in ranks if rank is not None}


def join(placements: list[Placement], options: RunOptions) -> "Shared | None":
    """What all layers share of the other processes; None if the plan names none.

    Raises DeviceError if torch.distributed does not have the processes that the plan names.
    """
    ranks = ranks_of(placements)
    if not ranks:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise DeviceError(
            f"The plan has experts on rank{max(ranks)}, but torch.distributed is not initialised. "
            f"Start with torchrun --nproc-per-node {max(ranks) + 1} and call "
            "torch.distributed.init_process_group() before loading."
        )
    size = dist.get_world_size()
    if max(ranks) >= size:
        raise DeviceError(
            f"The plan has experts on rank{max(ranks)}, but there are {size} processes, rank0 to "
            f"rank{size - 1}."
        )
    return Shared(options)


class Shared:
    """The processes, and what has been sent to and fro. bytes: by this process, since it began."""

    def __init__(self, options: RunOptions) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.options = options
        self._meet("begin to load")
        # a group of its own: its time-out is ours, and no other traffic comes in between
        self.group = dist.new_group(timeout=timedelta(seconds=options.timeout))
        self.broken = ""  # why no call can be made any more
        self.bytes = 0
        self.ways: dict[str, int] = {}  # how often each way was taken

    def for_layer(self, placement: Placement) -> "Group":
        return Group(self, placement)

    def loaded(self) -> None:
        """Waits until all processes have their weights. The time that loading takes differs by
        more than a call may take: RunOptions.timeout begins with the first call."""
        self._meet("load its experts")

    def _meet(self, what: str) -> None:
        """All processes come here, within the time-out that the user gave to torch.distributed."""
        try:
            dist.barrier()
        except RuntimeError as error:
            raise DeviceError(
                f"rank{self.rank} of {self.size} waited for the other processes to {what}, but one "
                f"cannot be reached ({_first_line(error)}). It has ended, or took longer than the "
                "timeout of init_process_group(); see what it said, and start all of them again."
            ) from None

    def leave(self, why: str, error: BaseException) -> None:
        """After an error the processes are out of step for good. The connections are closed, so
        that those which wait for this process notice now, and not when their time is over."""
        self.broken = why
        # gloo's are closed with the last reference to the group, and some are in the traceback
        traceback.clear_frames(error.__traceback__)
        if dist.get_backend(self.group) == "gloo":
            group, self.group = self.group, None
            dist.destroy_process_group(group)


class Group:
    """One layer's other processes."""

    def __init__(self, shared: Shared, placement: Placement) -> None:
        self.shared, self.rank, self.size = shared, shared.rank, shared.size
        self.num_experts = number = (
            max(expert for part in placement.parts for expert in part.ids) + 1
        )
        # -1: of each process its own; one more row stands for "none"
        self.owner = torch.full((number + 1,), -1, dtype=torch.int64)
        for part in placement.parts:
            rank = split_rank(part.device)[0]
            if rank is not None:
                self.owner[list(part.ids)] = rank

    def run(
        self,
        layer: LayerExperts,
        local: Callable[..., Tensor],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """The sum over all processes' experts, float32, where hidden is.

        local  the sum over this process's experts, for any tokens
        Raises DeviceError if another process is gone, or does not answer in time.
        """
        shared = self.shared
        if shared.broken:
            raise DeviceError(shared.broken)
        failed: list[BaseException] = []

        def own(*inputs: Tensor) -> Tensor:
            try:
                return local(*inputs)
            except BaseException as error:
                failed.append(error)
                raise

        way = self._own_tokens if shared.options.tokens == "own" else self._same_tokens
        try:
            return way(own, hidden, ids, weights)
        except BaseException as error:
            if failed:
                if not isinstance(error, KernelError):  # wrong inputs: all processes say the same
                    why = f"{error} (Earlier; since then the processes are out of step.)"
                    shared.leave(why, error)
                raise
            if not isinstance(error, RuntimeError):
                raise
            sentence = (
                f"Layer {layer.layer}: rank{self.rank} of {self.size} cannot reach another process "
                f"({_first_line(error)}). It has ended, hangs, or runs another model; start all of "
                f"them again. The time-out is {shared.options.timeout:g} s: "
                "ExpertsConfig(timeout=...)."
            )
            shared.leave(sentence, error)
            raise DeviceError(sentence) from None

    def _owners(self, ids: Tensor) -> Tensor:
        """[num_tokens, size] bool: which processes have experts of a token."""
        none = len(self.owner) - 1
        ids = ids.to("cpu", torch.int64)
        owner = self.owner[torch.where((ids < 0) | (ids > none), none, ids)]
        return (owner[..., None] == torch.arange(self.size)).any(1)

    def _same_tokens(
        self,
        local: Callable[..., Tensor],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        here = self._owners(ids)
        own = torch.where(self._is_own(ids), ids, -1)
        others = torch.where(self._is_own(ids), -1, ids)
        share = local(hidden, others, weights)
        rows = int(here.sum())
        everything = 2 * hidden.shape[0]  # rows that an all-reduce moves, times (size - 1)
        if rows < everything:
            total = self._exchange_rows(share, here)
        else:
            total = share.clone()
            dist.all_reduce(total, group=self.shared.group)
            self._moved(
                "all_reduce", everything * total.shape[1] * 4 * (self.size - 1) // self.size
            )
        # what each process has for itself is added by each, after the sum
        return total.add_(local(hidden, own, weights)) if bool((own >= 0).any()) else total

    def _is_own(self, ids: Tensor) -> Tensor:
        none = len(self.owner) - 1
        owner = self.owner.to(ids.device)
        known = (ids >= 0) & (ids < none)
        return known & (owner[ids.clamp(0, none).long()] == -1)

    def _exchange_rows(self, share: Tensor, here: Tensor) -> Tensor:
        """Each process's rows that have a share, to all others."""
        total = torch.zeros_like(share)
        for rank in range(self.size):
            tokens = here[:, rank].nonzero().flatten().to(share.device)
            if len(tokens) == 0:
                continue
            mine = rank == self.rank
            rows = share[tokens] if mine else share.new_empty((len(tokens), share.shape[1]))
            dist.broadcast(rows, group_src=rank, group=self.shared.group)
            total.index_add_(0, tokens, rows)
            if mine:
                self._moved("rows", rows.numel() * 4 * (self.size - 1))
        return total

    def _own_tokens(
        self,
        local: Callable[..., Tensor],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        here = self._owners(ids)
        counts = self._all_counts(torch.cat([here.sum(0), torch.tensor([hidden.shape[0]])]))
        tokens = counts[:, -1]
        sent = counts[:, :-1] - torch.diag(counts[:, :-1].diagonal())
        row = hidden.shape[1] * hidden.element_size() + ids.shape[1] * 12
        back = hidden.shape[1] * 4
        some = int(sent.sum()) * (row + back)
        everything = int(tokens.sum()) * (self.size - 1) * (row + 2 * back)
        own = torch.where(self._is_own(ids), ids, -1)
        others = torch.where(self._is_own(ids), -1, ids)
        if some <= everything:
            total = self._all_to_all(local, hidden, others, weights, here, counts)
            self._moved("all_to_all", int(sent[self.rank].sum()) * row)
        else:
            total = self._gather(local, hidden, others, weights, tokens.tolist())
            self._moved("gather", int(tokens[self.rank]) * (self.size - 1) * row)
        return total.add_(local(hidden, own, weights)) if bool((own >= 0).any()) else total

    def _all_counts(self, counts: Tensor) -> Tensor:
        """[size, len(counts)] of all processes, on the CPU."""
        device = self._device()
        rows = [torch.empty_like(counts, device=device) for _ in range(self.size)]
        dist.all_gather(rows, counts.to(device), group=self.shared.group)
        return torch.stack(rows).cpu()

    def _device(self) -> torch.device:
        gpu = dist.get_backend(self.shared.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

    def _all_to_all(
        self,
        local: Callable[..., Tensor],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        here: Tensor,
        counts: Tensor,
    ) -> Tensor:
        out = counts[self.rank, :-1].tolist()
        back = counts[:, self.rank].tolist()
        order = torch.cat([here[:, rank].nonzero().flatten() for rank in range(self.size)])
        order = order.to(hidden.device)
        arrived = [
            self._send(tensor[order], out, back)
            for tensor in (hidden, ids.to(torch.int64), weights.float())
        ]
        shares = self._send(local(arrived[0], arrived[1], arrived[2]), back, out)
        total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        return total.index_add_(0, order, shares)

    def _send(self, rows: Tensor, out: list[int], back: list[int]) -> Tensor:
        """Rows for each process, in the order of ranks; returns those from each."""
        arrived = rows.new_empty((sum(back), *rows.shape[1:]))
        dist.all_to_all_single(arrived, rows.contiguous(), back, out, group=self.shared.group)
        return arrived

    def _gather(
        self,
        local: Callable[..., Tensor],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        tokens: list[int],
    ) -> Tensor:
        """Everyone's tokens to everyone, and an all-reduce of what comes of them."""
        whole = [
            self._everyones(tensor, tokens)
            for tensor in (hidden, ids.to(torch.int64), weights.float())
        ]
        total = local(whole[0], whole[1], whole[2]).clone()
        dist.all_reduce(total, group=self.shared.group)
        first = sum(tokens[: self.rank])
        return total[first : first + tokens[self.rank]].clone()

    def _everyones(self, rows: Tensor, tokens: list[int]) -> Tensor:
        most = max(tokens)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self.shared.group)
        return torch.cat([one[:n] for one, n in zip(found, tokens, strict=True)])

    def _moved(self, way: str, size: int) -> None:
        self.shared.bytes += size
        self.shared.ways[way] = self.shared.ways.get(way, 0) + 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        return self  # the processes are not copied with a model
