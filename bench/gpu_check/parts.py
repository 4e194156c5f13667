# SPDX-License-Identifier: Apache-2.0
"""The parts, in order: what must hold before what is measured. A part is
run(card, results, clock, save): it adds to results, calls save() when it has something worth
keeping, asks clock.need(seconds) before what takes long, and skips what results already has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import crossovers

SHAPE_NAMES = ("Qwen3-30B-A3B", "gpt-oss-120b", "Mixtral-8x7B", "DeepSeek-V3")
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
ROUTINGS = ("uniform", "zipf")
FORMATS = ("bf16-rows", "bf16", "fp8", "fp8 fast", "int8", "int4-g128", "int4-g32", "mxfp4")
PEER_NAMES = (
    *("hf_grouped_mm", "hf_batched_mm", "triton_fused_moe", "vllm_fused_experts"),
    *("vllm_marlin_int4", "deep_gemm_fp8", "humming_int4"),
)
BATCHED_MM_TOKENS = 8  # it copies the weights of every pair
DEEP_GEMM_TOKENS = 256  # it pads every expert's tokens to 128

Save = Callable[[], None]


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    least_seconds: float
    run: Callable[[Any, dict[str, Any], Any, Save], None]


def _build(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
    results.update(card.build(clock.left()))


def _tests(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
    results.update(card.tests(clock.left()))


def _sanitizer(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
    results.update(card.sanitizer(clock.left()))


def _ceilings(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
    for name, measure in card.ceilings().items():
        if name not in results:
            clock.need(5)
            results[name] = measure()
            save()


def _handoff(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
    for name, measure in card.handoff().items():
        if name not in results:
            clock.need(5)
            results[name] = measure()
            save()


def cases(shape_name: str) -> list[tuple[str, str, int]]:
    """(contender, routing, tokens): what matters first. Skewed routing for a few sizes only."""
    out = []
    for tokens in TOKENS:
        for contender in (*FORMATS, *PEER_NAMES):
            if contender == "hf_batched_mm" and tokens > BATCHED_MM_TOKENS:
                continue
            if contender == "deep_gemm_fp8" and tokens < DEEP_GEMM_TOKENS:
                continue
            out.append((contender, "uniform", tokens))
            if tokens in (16, 256, 4096):
                out.append((contender, "zipf", tokens))
    return sorted(out, key=lambda case: (*FORMATS, *PEER_NAMES).index(case[0]))


def _crossovers(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
    """Both kernels of each border, forced; then the table that the library reads."""
    for shape_name in SHAPE_NAMES:
        of_shape = results.setdefault(shape_name, {})
        loaded: str | None = None
        layer = None
        for format, family, tokens in crossovers.cases(shape_name, card.capability):
            key = f"{format}/{family}/{tokens}"
            if key in of_shape:
                continue
            if loaded != format:
                clock.need(15)
                layer = None
                layer = card.layer(shape_name, format)
                loaded = format
            clock.need(5)
            of_shape[key] = None if layer is None else layer.measure_with(family, tokens)
            save()
    lines = [
        line
        for shape_name in SHAPE_NAMES
        for format in crossovers.FORMATS
        if (line := crossovers.line(shape_name, format, card.capability, results[shape_name]))
    ]
    results["table"] = lines
    results["file"] = card.write_crossovers([crossovers.HEAD, *lines])


def _layer(shape_name: str) -> Callable[[Any, dict[str, Any], Any, Save], None]:
    def run(card: Any, results: dict[str, Any], clock: Any, save: Save) -> None:
        loaded: str | None = None
        layer = None
        for contender, routing, tokens in cases(shape_name):
            key = f"{contender}/{routing}/{tokens}"
            if key in results:
                continue
            if loaded != contender:
                clock.need(15)
                layer = None  # its memory, before the next one's
                layer = card.layer(shape_name, contender)
                loaded = contender
                if isinstance(layer, str):  # why it is not measured here
                    results.setdefault("left_out", {})[contender] = layer
                    layer = None
            clock.need(5)
            # None: this contender is not on this machine, or does not fit; results["left_out"]
            # has the reason
            results[key] = None if layer is None else layer.measure(tokens, routing)
            save()

    return run


PARTS = (
    Part("build", "builds the native module for this card alone", 60, _build),
    Part("tests", "pytest -m gpu", 20, _tests),
    Part("sanitizer", "compute-sanitizer on small calls of every kernel", 20, _sanitizer),
    Part("ceilings", "copy, read and matrix rates of the card", 10, _ceilings),
    Part("handoff", "asking the CPU in the middle of a layer", 10, _handoff),
    *(
        Part(f"layer:{name}", f"every kernel and peer on a layer of {name}", 20, _layer(name))
        for name in SHAPE_NAMES
    ),
    Part("crossovers", "where one kernel becomes faster than another, as a table", 20, _crossovers),
)
PART_NAMES = tuple(part.name for part in PARTS)
