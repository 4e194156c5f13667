# SPDX-License-Identifier: Apache-2.0
"""What dispatch costs a layer in Python, beside the op's own time. Run it as a script.

plain   one device: a call of the layer against a call of torch.ops.expertyard.moe_experts
split   CPU and a virtual GPU: a call of the layer against the two parts' ops one after the other in
        the same thread. The parts overlap, so with free cores the difference may be negative.
empty   the same split, with experts so small that the ops' own time is next to nothing
asleep  the same, 1 ms of other work before each call, as attention is: the lane has gone to sleep
        and is woken, while in the other rows it still spins

Prints the median of many rounds, both sides in turns, in microseconds.
"""

import os
import statistics
import time

os.environ.setdefault("EXPERTYARD_VIRTUAL_GPUS", "2")

import torch

from expertyard.dispatch import LayerExperts, PartPlan, Placement, spread
from expertyard.ops import moe_experts_into
from expertyard.testing import calc_diff, random_problem

ROUNDS = 2000


def measure(
    size: int, split: dict[str, tuple[int, ...]], home: str, between: float
) -> tuple[float, float, float]:
    """(the layer, the ops alone, the difference), medians in microseconds."""
    p = random_problem(
        num_tokens=1, hidden_size=size, intermediate_size=size, num_experts=8, top_k=4
    )
    packed = p.pack()
    parts = tuple(
        PartPlan(ids, device, "bf16", device.partition(":")[0], "") for device, ids in split.items()
    )
    made = spread(packed, [(part.ids, part.device) for part in parts])
    layer = LayerExperts(Placement(home, parts), made)
    arguments = p.hidden_states, p.topk_ids, p.topk_weights
    out = torch.empty(p.hidden_states.shape, dtype=torch.float32)
    assert calc_diff(layer(*arguments), p.reference()) < 3.5e-3
    whole: list[float] = []
    ops: list[float] = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            work_until = time.perf_counter() + between
            while time.perf_counter() < work_until:
                pass
            begin = time.perf_counter()
            layer(*arguments)
            middle = time.perf_counter()
            for part in layer.parts:
                moe_experts_into(*arguments, part.packed, out)
            end = time.perf_counter()
            whole.append((middle - begin) * 1e6)
            ops.append((end - middle) * 1e6)
    difference = statistics.median(a - b for a, b in zip(whole, ops, strict=True))
    return statistics.median(whole), statistics.median(ops), difference


def main() -> None:
    torch.set_num_threads(1)
    every, some, others = tuple(range(8)), (0, 1, 2, 3), (4, 5, 6, 7)
    print(f"{'':24}{'layer':>10}{'ops':>10}{'overhead':>10}  us")
    whole, two = {"cpu": every}, {"cuda:0": some, "cpu": others}
    three = {"cuda:0": (0, 1, 2), "cuda:1": (3, 4, 5), "cpu": (6, 7)}
    for name, size, split, home, between in (
        ("plain, 16", 16, whole, "cpu", 0.0),
        ("plain, 512", 512, whole, "cpu", 0.0),
        ("split, empty, 16", 16, two, "cuda:0", 0.0),
        ("in three, empty, 16", 16, three, "cuda:0", 0.0),
        ("split, asleep, 16", 16, two, "cuda:0", 1e-3),
        ("split, 512", 512, two, "cuda:0", 0.0),
        ("split, 1024", 1024, two, "cuda:0", 0.0),
    ):
        layer, ops, difference = measure(size, split, home, between)
        print(f"{name:24}{layer:10.1f}{ops:10.1f}{difference:10.1f}")


if __name__ == "__main__":
    main()
