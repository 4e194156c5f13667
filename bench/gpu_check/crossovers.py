# SPDX-License-Identifier: Apache-2.0
"""Where one family of kernels becomes faster than another, from times of both, and the table of it
that the library reads (csrc/cuda/crossovers.cuh, EXPERTYARD_CUDA_CROSSOVERS).
"""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from expertyard.bench.shapes import SHAPES, Shape
from expertyard.formats import get_format

FORMATS = ("bf16", "fp8", "int8", "int4-g128", "int4-g32", "mxfp4")
# few pairs an expert, many: what serves below and above a border, and where to look for it
BORDERS = {
    "stream": ("cuda_stream", "cuda_grouped", (2, 4, 8, 16, 32)),
    "wgmma": ("cuda_grouped", "cuda_wgmma", (16, 32, 64, 128, 256)),
}
MOST_STREAM_PAIRS = 1024  # of a call that cuda_stream serves
HEAD = "# capability format group hidden intermediate experts stream_pairs wgmma_pairs"


def cases(shape_name: str, capability: int) -> Iterable[tuple[str, str, int]]:
    """(format, family, tokens): each side of every border."""
    shape = SHAPES[shape_name]
    for format in FORMATS:
        for border, (below, above, pairs) in BORDERS.items():
            if border == "wgmma" and capability != 90:
                continue
            for p in pairs:
                tokens = tokens_of(shape, p)
                if border == "stream" and tokens * shape.top_k > MOST_STREAM_PAIRS:
                    continue
                yield format, below, tokens
                yield format, above, tokens


def tokens_of(shape: Shape, pairs: int) -> int:
    """That have so many pairs an expert."""
    return max(1, round(pairs * shape.num_experts / shape.top_k))


def border(points: Iterable[tuple[float, float, float]]) -> float:
    """(pairs, us below, us above), ascending -> pairs where above becomes faster and stays so: the
    middle, as a ratio, of the two points around; the last point if it never does; 0: no points."""
    last, found = 0.0, 0.0
    for pairs, below, above in points:
        if above >= below:
            found = pairs
        elif found == last:
            found = sqrt(last * pairs) if last else pairs / 2
        last = pairs
    return found


def line(shape_name: str, format: str, capability: int, results: Mapping[str, Any]) -> str | None:
    """The table's line of one format; None: nothing was measured."""
    shape, f = SHAPES[shape_name], get_format(format)
    found = {}
    for name, (below, above, all_pairs) in BORDERS.items():
        points = []
        for p in all_pairs:
            tokens = tokens_of(shape, p)
            both = [results.get(f"{format}/{family}/{tokens}") for family in (below, above)]
            if both[0] and both[1]:
                pairs = tokens * shape.top_k / shape.num_experts
                points.append((pairs, both[0]["us"], both[1]["us"]))
        found[name] = border(points)
    if not any(found.values()):
        return None
    group = 0 if f.base == "bf16" else f.group_size
    return (
        f"{capability} {f.base} {group} {shape.hidden_size} {shape.intermediate_size} "
        f"{shape.num_experts} {found['stream']:.3g} {found['wgmma']:.3g}"
    )
