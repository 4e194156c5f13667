# SPDX-License-Identifier: Apache-2.0
"""LayerExperts: the experts of one layer, in parts on the devices of the plan, at work together.

    out = round(sum over parts of  sum_k topk_weights[t, k] * FFN[topk_ids[t, k]](hidden[t]))

where an expert adds to the sum of the part that has it. Each part's sum and the sum of parts are in
float32 and rounded once, at home: where the layer's hidden states are. GPUs get their parts first;
the caller then computes the CPU's part itself while they work. Parts in this machine's memory, the
CPU's and those of virtual GPUs, are one native call (ops.moe_parts).
"""

import itertools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import virtual
from ..errors import DeviceError, KernelError, PlanError
from ..native import _C
from ..ops import moe_experts, moe_parts, refuse_backward
from ..weights import Expert, PackedExperts
from . import trace
from .copies import bring, copy_expert, multiply
from .handoff import Desks
from .lanes import Ticket, submit
from .options import RunOptions
from .placement import PartPlan, Placement, Prefill, split_rank
from .streaming import stream

__all__ = ["LayerExperts", "Part", "layer_of"]

_keys = itertools.count(1)
_layers: "weakref.WeakValueDictionary[int, LayerExperts]" = weakref.WeakValueDictionary()
Finish = Callable[[], Tensor]
T = TypeVar("T")


class Part:
    """Experts of one layer on one device.

    stream_from  tokens of a call from which the weights go to `prefill.device` for it; None: never
    """

    def __init__(self, plan: PartPlan, packed: PackedExperts) -> None:
        self.device, self.op, self.why = plan.device, plan.op, plan.why
        self.local = split_rank(plan.device)[1]
        self.packed = packed
        self.prefill = plan.prefill
        self.stream_from: int | None = None
        self.is_cpu = self.local == "cpu"
        self.is_virtual = virtual.gpu(self.local) is not None
        # by our kernels in this machine's memory
        self.is_ours_here = self.op != "torch" and (self.is_cpu or self.is_virtual)

    def plan(self) -> PartPlan:
        return PartPlan(
            self.packed.here(), self.device, self.packed.format, self.op, self.why, self.prefill
        )


class LayerExperts:
    """Callable: (hidden_states, topk_ids, topk_weights) -> the weighted sum of the experts.

    layer    its number, for messages
    home     the plan's device of the layer, where hidden states come from and the result goes
    parts    none is empty; together they have every expert, unless other processes have some
    group    of the processes that have other experts, or None (see parallel.Group)
    after    called with (self, topk_ids) when a call is done: statistics and policies
    desks    for hand-offs between a real GPU and the CPU; one object for all layers of a model
    next     the layer that adds what this one defers (RunOptions.defer), or None: nothing is
    overlaps  whether a call leaves its GPU waiting for other devices: room for a `meanwhile`
    """

    def __init__(
        self,
        placement: Placement,
        packed: Sequence[PackedExperts],
        *,
        layer: int = 0,
        options: RunOptions | None = None,
        group: Any = None,
    ) -> None:
        self.layer, self.home = layer, placement.home
        self._home_device = split_rank(placement.home)[1]
        self._virtual = virtual.number() > 0  # asked once: the environment is slow to ask
        self.options = options or RunOptions()
        self.parts = [Part(p, w) for p, w in zip(placement.parts, packed, strict=True)]
        self.group = group
        self.after: Callable[[LayerExperts, Tensor], None] | None = None
        self.desks = Desks()
        self.next: LayerExperts | None = None
        self.defers_any = False  # also in calls of many tokens: to see what it does to a prompt
        self._late: Ticket | None = None  # the share of the layer before, still at work
        self._meanwhile: Callable[[], object] | None = None  # of the call that runs
        self.moved: dict[int, str] = {}  # expert -> device, of those that are not where planned
        self._kept: dict[int, Expert] = {}  # experts on GPUs whose copy in RAM is still there
        self._lock = threading.RLock()
        self.key = next(_keys)
        _layers[self.key] = self
        for part in self.parts:
            if part.prefill is not None:
                part.stream_from = self.options.prefill_tokens
        self.num_experts = self.parts[0].packed.num_experts if self.parts else group.num_experts
        self._arrange()

    def _arrange(self) -> None:
        """What every call would ask again: whether it is one plain call of the op."""
        plain = len(self.parts) == 1 and self.group is None and self.parts[0].op != "torch"
        part = self.parts[0] if plain else None
        self._plain = part.packed if part is not None and self._is_home(part) else None
        self._order = sorted(self.parts, key=lambda part: not part.is_cpu)
        self._together = _Together(p for p in self._order if p.is_ours_here)
        self._are_together = len(self._together.parts) == len(self.parts) > 0
        self._asked = self._capturable()
        self.overlaps = (
            self._home_device != "cpu"
            and self.group is None
            and not all(self._is_home(part) for part in self.parts)
        )
        self._stream_from = min(
            (p.stream_from for p in self.parts if p.stream_from is not None), default=1 << 62
        )

    def _capturable(self) -> "_Asked | None":
        """The parts as a GPU asks for them; None: plain PyTorch is among them, or two of a device
        (which have two formats), or there is none."""
        cpu = [part for part in self.parts if part.is_cpu]
        home = [part for part in self.parts if self._is_home(part)]
        away = [part for part in self.parts if part not in cpu and part not in home]
        ours = all(part.op != "torch" and not part.is_virtual for part in self.parts)
        devices = {part.device for part in self.parts}
        if not self.parts or not ours or self._home_device == "cpu":
            return None
        if len(devices) < len(self.parts) or self.group is not None:
            return None
        return _Asked(cpu[0] if cpu else None, home[0] if home else None, away)

    def _is_home(self, part: Part) -> bool:
        return part.local == self._home_device

    @property
    def placement(self) -> Placement:
        """Where the experts are now."""
        return Placement(self.home, tuple(part.plan() for part in self.parts))

    @property
    def nbytes(self) -> int:
        return sum(part.packed.nbytes for part in self.parts)

    def part_of(self, expert: int) -> Part:
        """The part that has an expert. PlanError if none has."""
        for part in self.parts:
            if 0 <= expert < self.num_experts and part.packed.expert(expert) is not None:
                return part
        raise PlanError(
            f"Layer {self.layer}: expected an expert from 0 to {self.num_experts - 1} that is in "
            f"this process, got {expert}."
        )

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """[num_tokens, hidden_size] -> the same shape and dtype, at home.

        meanwhile  work of the caller's on the layer's GPU, called once: where the layer `overlaps`,
                   after other devices got their parts and before theirs is waited for. Its error
                   is the call's, once the parts have ended. Not for compiled calls.
        Raises KernelError for wrong arguments, DeviceError for a device that fails or hangs.
        """
        if torch.compiler.is_compiling():
            return self._compiled(hidden_states, topk_ids, topk_weights)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad):
            if meanwhile is not None:
                meanwhile()
            out: Tensor = _moe_layer(hidden_states, topk_ids, topk_weights, self.key)
            return out
        return self.run(hidden_states, topk_ids, topk_weights, meanwhile)

    def _compiled(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._plain is not None and self.after is None and not virtual.number():
            return moe_experts(hidden_states, ids, weights, self._plain)
        out: Tensor = _moe_layer(hidden_states, ids, weights, self.key)
        return out

    def run(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """The same, eager and without a gradient."""
        with self._lock:
            self._meanwhile = meanwhile
            plain = self._plain
            late, self._late = self._late, None
            chosen = topk_ids
            if hidden_states.device.type == "cuda" and (late is not None or self.options.defer):
                self._refuse_capture(hidden_states.shape[0])
            if self.options.defer and self.next is not None:
                topk_ids = self._defer(self.next, hidden_states, topk_ids, topk_weights)
            if (
                plain is not None
                and late is None
                and hidden_states.shape[0] < self._stream_from
                and hidden_states.device == plain.device
            ):
                out = self._run_plain(plain, hidden_states, topk_ids, topk_weights)
            else:
                out = self._run_parts(hidden_states, topk_ids, topk_weights, late)
            self._run_meanwhile(hidden_states.shape[0])  # where there was nothing to wait for
            if self.after is not None:
                self.after(self, chosen)
            return out

    def _run_meanwhile(self, num_tokens: int) -> None:
        """What the caller wants done while other devices compute; once a call."""
        work, self._meanwhile = self._meanwhile, None
        if work is None:
            return
        tracer = trace.active()
        if tracer is None:
            work()
        else:
            name = f"layer {self.layer} shared experts"
            _traced(tracer, name, self._home_device, num_tokens, work)

    def _defer(self, later: "LayerExperts", hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Gives the least weighted experts of each token on the CPU to its lane, for the next layer
        to add; returns the ids that are left. At least one expert of a token is left."""
        part = next((p for p in self.parts if p.is_cpu), None)
        number = min(self.options.defer, ids.shape[1] - 1)
        few = ids.shape[0] < self.options.prefill_tokens
        if part is None or number < 1 or not (few or self.defers_any):
            return ids
        here = torch.zeros(self.num_experts + 1, dtype=torch.bool)
        here[list(part.packed.here())] = True
        hidden, on_cpu, weights = (bring(t, "cpu") for t in (hidden, ids, weights))
        candidates = here[on_cpu.clamp(0, self.num_experts).long()] & (on_cpu >= 0)
        ranked = weights.float().masked_fill(~candidates, torch.inf)
        least = ranked.topk(number, largest=False).indices
        late = torch.zeros_like(candidates).scatter_(1, least, True) & candidates
        deferred = on_cpu.masked_fill(~late, -1)
        name = f"layer {self.layer} (deferred)"
        later._late = submit(
            "cpu", _work, name, part.packed, part.op, None, "cpu", hidden, deferred, weights
        )
        return bring(on_cpu.masked_fill(late, -1), self.home).to(ids.device)

    def _run_plain(
        self, packed: PackedExperts, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        tracer = trace.active()
        if tracer is None:
            return moe_experts(hidden, ids, weights, packed)
        return _traced(
            tracer, f"layer {self.layer}", self.parts[0].local, hidden.shape[0],
            lambda: moe_experts(hidden, ids, weights, packed),
        )  # fmt: skip

    def _run_parts(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, late: Ticket | None = None
    ) -> Tensor:
        rounds = late is None and self.group is None  # nothing is added to the parts' sum
        if self.group is not None and hidden.device.type == "cuda":
            self._refuse_capture(hidden.shape[0])
        total = (
            self._sum_with_room(hidden, ids, weights, rounds)
            if self.group is None
            else self.group.run(self, self._sum_with_room, hidden, ids, weights)
        )
        if late is not None:
            share = late.wait(self.options.timeout, "a deferred share")
            if share.shape == total.shape:  # else of a step that was broken off
                total = total.add_(bring(share, self.home).to(total.device))
        out = total if total.dtype == hidden.dtype else total.to(hidden.dtype)
        return virtual.mark(out, self.home) if self._virtual else out

    def _sum_with_room(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, may_round: bool = False
    ) -> Tensor:
        """_sum(), again after experts went back to the CPU where a GPU has no room for the call."""
        while True:
            try:
                return self._sum(hidden, ids, weights, may_round)
            except _NoRoomError as error:
                self._make_room(error)

    def _sum(self, hidden: Tensor, ids: Tensor, weights: Tensor, may_round: bool = False) -> Tensor:
        """The parts' sum in float32, at home; in hidden's dtype where it may be and that is less
        work."""
        if self._virtual and (place := virtual.marked(hidden)) not in (None, self.home):
            raise DeviceError(
                f"Layer {self.layer}: its hidden states were expected on {self.home}, but they are "
                f"on {place}: a transfer was forgotten."
            )
        num_tokens = hidden.shape[0]
        is_here = hidden.device.type == "cpu"
        if not is_here and self._asks_cpu(num_tokens, may_round):
            return self._ask_cpu(hidden, ids, weights)
        if is_here and self._are_together and num_tokens < self._stream_from:
            if self._meanwhile is None:
                return self._run_together(self._together, hidden, ids, weights, may_round)
            finish = self._begin_together(self._together, hidden, ids, weights, may_round)
            try:
                self._run_meanwhile(num_tokens)
            except BaseException:
                finish()
                raise
            return finish()
        begun: list[tuple[Part, Finish]] = []
        ours: list[Part] = []
        # A copy to the CPU waits for what was queued before it, so it is queued first; what the
        # caller computes itself comes last.
        for part in self._order:
            streams = part.stream_from is not None and num_tokens >= part.stream_from
            if is_here and part.is_ours_here and not streams:
                ours.append(part)
            else:
                begun.append((part, self._begin(part, streams, hidden, ids, weights)))
        if ours:
            together = _Together(ours)
            finish = self._begin_together(together, hidden, ids, weights, False)
            begun.insert(0, (ours[0], finish))
        total: Tensor | None = None
        error: BaseException | None = None
        try:
            self._run_meanwhile(num_tokens)
        except BaseException as problem:
            error = problem
        for part, finish in begun:  # the CPU first; every ticket is waited for, whatever happens
            try:
                share = finish()
            except torch.OutOfMemoryError as problem:
                error = error or _NoRoomError(part, problem)
                continue
            except BaseException as problem:
                error = problem if isinstance(error, _NoRoomError | None) else error
                continue
            total = share if total is None else total.add_(share)
        if error is not None:
            raise error
        if total is None:  # all experts are in other processes
            return hidden.new_zeros(hidden.shape, dtype=torch.float32)
        return total

    def _asks_cpu(self, num_tokens: int, may_round: bool) -> bool:
        """Whether the GPU asks the CPU itself: always while a CUDA graph is captured, where no
        thread of the host can wait for it."""
        asked = self._asked
        can = asked is not None and may_round and num_tokens < self._stream_from
        if not torch.cuda.is_current_stream_capturing():
            flagged = can and self.options.handoff != "auto"
            return flagged and asked is not None and asked.cpu is not None and not asked.away
        if not can and any(part.local != self._home_device for part in self.parts):
            self._refuse_capture(num_tokens)
        return can

    def _refuse_capture(self, num_tokens: int) -> None:
        """DeviceError while a CUDA graph is captured, before CUDA says it in its own words."""
        if torch.cuda.is_current_stream_capturing():
            raise DeviceError(
                f"Layer {self.layer}: a call of {num_tokens} tokens cannot be in a CUDA graph. "
                "Its parts may be on GPUs and the CPU, one format a device, with no plain PyTorch, "
                "no other processes, no deferral, and no weights that are brought for the call."
            )

    def _ask_cpu(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The GPU asks the CPU and other GPUs, runs its own experts meanwhile, and adds what comes:
        all queued on its stream. The sum, rounded once."""
        assert self._asked is not None
        cpu, home, away = self._asked.cpu, self._asked.home, self._asked.away
        question = hidden, ids, weights
        asked = None if cpu is None else self.desks.ask(*question, cpu.packed, self.options)
        sent = [self.desks.send(*question, part.packed) for part in away]
        share = None
        if home is not None:
            name = f"layer {self.layer}"
            share = _work(name, home.packed, home.op, None, home.local, *question)
        error: BaseException | None = None
        try:
            self._run_meanwhile(hidden.shape[0])
        except BaseException as problem:  # what was asked for is collected all the same
            error = problem
        for one in sent:
            arrived = one.collect()
            share = arrived if share is None else share.add_(arrived)
        if asked is not None:
            share = asked.collect(share)
        if error is not None:
            raise error
        assert share is not None
        return share.to(hidden.dtype)

    def check(self) -> None:
        """Raises what went wrong in replays of CUDA graphs, or in earlier calls with
        RunOptions.handoff "flag" or "host"; their results are NaN. Call torch.cuda.synchronize()
        before to be sure of the answer."""
        self.desks.check()
        for part in self.parts:
            part.packed.check()

    def _begin_together(
        self, parts: "_Together", hidden: Tensor, ids: Tensor, weights: Tensor, may_round: bool
    ) -> Finish:
        """Parts in this machine's memory: computed by the caller when it waits for them; by another
        thread from now on if the caller has work of its own for the meantime."""
        if self._meanwhile is None or not self.overlaps or self.options.defer:
            return lambda: self._run_together(parts, hidden, ids, weights, may_round)
        ticket = submit("cpu", self._run_together, parts, hidden, ids, weights, may_round)

        def collect() -> Tensor:  # as long as it takes, as in the caller's thread
            out: Tensor = ticket.wait(threading.TIMEOUT_MAX, f"its part of layer {self.layer}")
            return out

        return collect

    def _run_together(
        self, parts: "_Together", hidden: Tensor, ids: Tensor, weights: Tensor, may_round: bool
    ) -> Tensor:
        """The sum of parts in this machine's memory, which work at the same time."""
        try:
            out = moe_parts(
                hidden, ids, weights, parts.handles, parts.lanes,
                timeout=self.options.timeout, layer=self.layer, fp32=not may_round,
            )  # fmt: skip
        except DeviceError:
            _abandoned.append(parts)  # a lane that was given up may still read them
            raise
        if (tracer := trace.active()) is not None:
            for part, (_, begin, end) in zip(parts.parts, _C.last_spans(), strict=True):
                name = f"layer {self.layer}"
                tracer.add(name, part.local, begin, end, tokens=hidden.shape[0])
        return virtual.mark(out, self.home) if self._virtual else out

    def _begin(
        self, part: Part, streams: bool, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Finish:
        """Starts a part; what it returns waits for the result, float32, at home."""
        device = part.local
        prefill: Prefill | None = part.prefill if streams else None
        if prefill is not None:
            device = prefill.device
        name = f"layer {self.layer}"
        if part.is_virtual if prefill is None else virtual.gpu(device) is not None:
            inputs = [hidden, ids, weights]
            if device != self._home_device:
                inputs = [bring(t, device) for t in inputs]
            ticket = submit(device, _work, name, part.packed, part.op, prefill, device, *inputs)

            def collect() -> Tensor:
                share: Tensor = ticket.wait(self.options.timeout, f"its part of {name}")
                return bring(virtual.mark(share, device), self.home)

            return collect
        if device == "cpu" and hidden.device.type == "cuda":
            return self._begin_behind_gpu(part, prefill, hidden, ids, weights)
        if device == "cpu":
            if self._virtual and self._home_device != "cpu":
                hidden, ids, weights = (bring(t, "cpu") for t in (hidden, ids, weights))

            def compute() -> Tensor:
                share = _work(name, part.packed, part.op, prefill, device, hidden, ids, weights)
                return bring(virtual.mark(share, "cpu"), self.home) if self._virtual else share

            return compute
        there = torch.device(device)
        inputs = [t.to(there, non_blocking=True) for t in (hidden, ids, weights)]
        share = _work(name, part.packed, part.op, prefill, device, *inputs)
        return lambda: share.to(hidden.device)

    def _begin_behind_gpu(
        self, part: Part, prefill: Prefill | None, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Finish:
        """The CPU's part of hidden states that a GPU has. Copies go through pinned memory, of this
        call alone; the caller waits for the copy down only, not for what is queued behind it."""
        stream_ = torch.cuda.current_stream(hidden.device)
        down = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in (hidden, ids, weights)
        ]
        arrived = torch.cuda.Event()
        arrived.record(stream_)
        name = f"layer {self.layer}"

        def compute() -> Tensor:
            arrived.synchronize()
            share = _work(name, part.packed, part.op, prefill, "cpu", *down)
            return share.pin_memory().to(hidden.device, non_blocking=True)

        return compute

    def _make_room(self, error: "_NoRoomError") -> None:
        """Half of the part's experts go back to the CPU, if that is allowed; else the error."""
        part = error.part
        if self.options.out_of_memory == "cpu" and part.prefill is not None and part.is_cpu:
            part.stream_from = None
            self._arrange()
            warnings.warn(
                f"Layer {self.layer}: {part.prefill.device} ran out of memory for weights that are "
                "brought to it for calls of many tokens; from now on they stay on the CPU.",
                stacklevel=2,
            )
            return
        ids = part.packed.here()
        size = sum(part.packed.expert_bytes(expert) for expert in ids)
        if self.options.out_of_memory != "cpu" or part.is_cpu:
            raise DeviceError(
                f"Layer {self.layer}: {part.device} ran out of memory: {error.problem} Its "
                f"{len(ids)} experts of this layer take {size} bytes. Leave it more room with "
                "memory or mb_resrv_per_gpu, or let experts go back to the CPU: "
                "ExpertsConfig(out_of_memory='cpu')."
            ) from None
        back = ids[len(ids) // 2 :]
        for expert in back:
            self.move(expert, "cpu")
        freed = sum(self.part_of(expert).packed.expert_bytes(expert) for expert in back)
        warnings.warn(
            f"Layer {self.layer}: {part.device} ran out of memory; {len(back)} of its {len(ids)} "
            f"experts ({freed} bytes) are back on the CPU.",
            stacklevel=2,
        )

    def move(self, expert: int, device: str) -> None:
        """Moves one expert, between two calls; the bits of its weights stay what they are.

        An expert that comes from the CPU keeps its memory there, so that going back is free.
        Raises PlanError for an expert or a device that cannot be, torch.OutOfMemoryError if the
        device has no room; then nothing has changed.
        """
        with self._lock:
            if self.next is not None and self.next._late is not None:
                self.next._late.wait(self.options.timeout, "a deferred share")
            source = self.part_of(expert)
            if source.device == device:
                return
            target = next((p for p in self.parts if p.device == device), None)
            if target is not None and target.packed.format != source.packed.format:
                raise PlanError(
                    f"Layer {self.layer}: expert {expert} is {source.packed.format}, the experts on"
                    f" {device} are {target.packed.format}; an expert keeps its format when it "
                    "moves."
                )
            tensors = source.packed.expert(expert)
            assert tensors is not None
            _wait_for(source.local, split_rank(device)[1])
            kept = self._kept.get(expert)
            if device == "cpu" and kept is not None:
                arriving: Expert = kept
            else:
                strides = target.packed.row_strides() if target is not None else None
                arriving = copy_expert(tensors, split_rank(device)[1], strides)
            if target is not None:
                target.packed.write(expert, arriving)
            else:
                op = "torch" if source.op == "torch" else split_rank(device)[1].partition(":")[0]
                plan = PartPlan((expert,), device, source.packed.format, op, "moved")
                self.parts.append(Part(plan, source.packed.holding({expert: arriving})))
            if source.is_cpu:
                self._kept[expert] = tensors
            elif device == "cpu":
                self._kept.pop(expert, None)
            source.packed.write(expert, None)
            if not source.packed.here():
                self.parts.remove(source)
            self.moved[expert] = device
            self._arrange()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerExperts":
        import copy

        packed = [copy.deepcopy(part.packed, memo) for part in self.parts]
        twin = LayerExperts(
            self.placement, packed, layer=self.layer, options=self.options, group=self.group
        )
        twin.moved, twin._kept = dict(self.moved), dict(self._kept)
        twin.desks = copy.deepcopy(self.desks, memo)
        return twin

    def __reduce__(self) -> Any:
        raise KernelError(
            "Packed experts cannot be pickled: they are pointers into this process's memory. "
            "Save the model with save_pretrained and load it again."
        )

    def __repr__(self) -> str:
        return f"LayerExperts(layer {self.layer}: {self.placement}, home {self.home})"


@dataclass(frozen=True)
class _Asked:
    """A layer's parts as its GPU sees them: on the CPU, its own, and on other GPUs."""

    cpu: Part | None
    home: Part | None
    away: list[Part]


class _Together:
    """Parts of one native call: handles of their experts, and whose lane (-1: the caller)."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = list(parts)
        self.handles = [part.packed.handle for part in self.parts]
        self.lanes = [-1 if part.is_cpu else int(part.local[5:]) for part in self.parts]


_abandoned: list[_Together] = []


class _NoRoomError(Exception):
    def __init__(self, part: Part, problem: BaseException) -> None:
        super().__init__(str(problem))
        self.part, self.problem = part, problem


def _work(
    name: str,
    packed: PackedExperts,
    op: str,
    prefill: Prefill | None,
    device: str,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """One part's share, computed where it is called; float32."""

    def compute() -> Tensor:
        if prefill is not None:
            return stream(packed, device, prefill.op, hidden, ids, weights)
        return multiply(packed, op, hidden, ids, weights)

    tracer = trace.active()
    if tracer is None:
        return compute()
    name = f"{name} (weights brought)" if prefill is not None else name
    return _traced(tracer, name, device, hidden.shape[0], compute)


def _traced(
    tracer: trace.Tracer, name: str, device: str, tokens: int, compute: Callable[[], T]
) -> T:
    if device.startswith("cuda") and virtual.gpu(device) is None:
        begin = tracer.gpu_begin(device)
        out = compute()
        tracer.gpu_end(name, device, begin, tokens=tokens)
        return out
    start = time.perf_counter_ns()
    out = compute()
    tracer.add(name, device, start, tokens=tokens)
    return out


def _wait_for(*devices: str) -> None:
    """No kernel that reads these tables is running any more."""
    for device in devices:
        if device.startswith("cuda") and virtual.gpu(device) is None:
            torch.cuda.synchronize(device)


def layer_of(key: int) -> LayerExperts:
    """The layer that a compiled graph calls by its key."""
    layer = _layers.get(key)
    if layer is None:
        raise KernelError("This compiled graph belongs to a model that is gone. Compile again.")
    return layer


@torch.library.custom_op("expertyard::moe_layer", mutates_args=())
def _moe_layer(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, key: int) -> Tensor:
    return layer_of(key).run(hidden_states, topk_ids, topk_weights)


@_moe_layer.register_fake
def _(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, key: int) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


refuse_backward(_moe_layer)
