# SPDX-License-Identifier: Apache-2.0
"""From how many tokens on it pays to bring a layer's CPU experts to a GPU for one call.

Measured once per machine, GPU, shape and format, and kept in a file: quickly when a model that
needs it is loaded (measure_new), or with more patience (measure). Until then a fixed rule of thumb,
from assumed speeds:

    tokens = bytes of the experts / kLink * kArithmetic / (6 * top_k * H * I)

the calls that last as long on the CPU (its arithmetic alone) as the weights are on their way. The
GPU's arithmetic is hidden behind the copies (streaming.py), and far shorter.
"""

import json
import math
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import virtual
from ..devices import torch_device
from ..errors import ConfigError, ExpertyardError
from ..weights import PackedExperts
from .copies import bring, multiply
from .lanes import submit
from .layer import LayerExperts, Part
from .placement import Prefill, split_rank
from .streaming import stream

__all__ = ["Crossover", "choose", "measure", "measure_new", "path"]

LINK = 20e9  # bytes/s from host memory to a GPU: PCIe 4.0 x16, as it is reached
ARITHMETIC = 1e12  # multiply-adds and adds a second of a CPU of 16 cores or so
FILE = "EXPERTYARD_CROSSOVERS"
MEASURE = (
    "EXPERTYARD_MEASURE"  # "never"; "auto", real GPUs when loading; "always", virtual ones too
)
SECONDS = 2.0  # that one load may measure for, all shapes together
THUMB, LOADED, MEASURED = "rule of thumb", "measured at load", "measured"
FEWEST, LARGEST = 32, 4096  # tokens that are tried when measuring
LONG = 0.02  # seconds of a call that is not repeated when there is little time
TOP_K = 8  # that the rule of thumb and the measurement take


@dataclass(frozen=True)
class Crossover:
    """tokens  of a call from which the weights go to the GPU; None: never
    why     who says so: THUMB, LOADED or MEASURED"""

    tokens: int | None
    why: str


def path() -> Path:
    """Where measurements are kept: $EXPERTYARD_CROSSOVERS, or below the user's cache folder."""
    if given := os.environ.get(FILE):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "expertyard" / "crossovers.json"


def choose(layer: LayerExperts) -> None:
    """For the parts on the CPU of a layer that lives on a GPU, and whose rules leave it open."""
    home = split_rank(layer.home)[1]
    if not home.startswith("cuda"):
        return
    for part in layer.parts:
        if part.is_cpu and part.op != "torch" and part.prefill is None:
            found = known(part.packed, home)
            part.prefill = Prefill(home, "cuda", found.why)
            part.stream_from = found.tokens
    layer._arrange()


def known(packed: PackedExperts, gpu: str) -> Crossover:
    """What is in the file, or was measured by this process, else the rule of thumb."""
    key = _key(packed, gpu)
    entry = _read().get(key) or _here.get(key)
    if entry is not None:
        return _crossover(entry)
    flops = 6 * TOP_K * packed.hidden_size * packed.intermediate_size
    if virtual.gpu(gpu) is not None:
        return Crossover(None, THUMB)  # the same cores: nothing is won by a copy
    return Crossover(max(32, int(packed.nbytes / LINK * ARITHMETIC / flops)), THUMB)


def _crossover(entry: dict[str, Any]) -> Crossover:
    return Crossover(entry["tokens"], LOADED if entry.get("quick") else MEASURED)


_here: dict[str, dict[str, Any]] = {}  # what measure_new() found, if it cannot be kept


def measure_new(layers: Iterable[LayerExperts]) -> None:
    """Measures, for SECONDS at most, the shapes for which there is only the rule of thumb; keeps
    what it finds in the file, and uses it. What there is no time for is left to the next load.

    A measurement that fails, or a file that cannot be written, is a warning: the model is loaded
    all the same. Raises ConfigError if $EXPERTYARD_MEASURE is none of its values.
    """
    wanted = os.environ.get(MEASURE) or "auto"
    if wanted not in ("auto", "always", "never"):
        raise ConfigError(f"{MEASURE}: expected auto, always or never, got {wanted!r}.")
    deadline = time.perf_counter() + SECONDS
    tried: dict[str, dict[str, Any] | None] = {}
    for layer in layers:
        home = split_rank(layer.home)[1]
        asked = wanted == "always" or (wanted == "auto" and virtual.gpu(home) is None)
        if not asked or not home.startswith("cuda") or layer.group is not None:
            continue  # processes that share the machine would measure each other
        for part in layer.parts:
            if not part.is_cpu or part.prefill is None or part.prefill.why != THUMB:
                continue
            key = _key(part.packed, home)
            if key not in tried:
                tried[key] = _try(part.packed, home, layer.options.timeout, deadline)
                if (entry := tried[key]) is not None:
                    _here[key] = entry
                    _keep(key, entry)
            if (entry := tried[key]) is not None:
                found = _crossover(entry)
                part.prefill, part.stream_from = Prefill(home, "cuda", found.why), found.tokens
        layer._arrange()


def _try(packed: PackedExperts, gpu: str, timeout: float, deadline: float) -> dict[str, Any] | None:
    try:
        found = _quickly(packed, gpu, timeout, deadline)
    except (ExpertyardError, RuntimeError) as error:
        problem = str(error).partition("\n")[0]
        warnings.warn(
            f"{gpu}: from how many tokens on weights are best brought to it could not be measured "
            f"({problem}). The rule of thumb holds; {MEASURE}=never does not try.",
            stacklevel=3,
        )
        return None
    return None if found is None else {"tokens": found[0], "seconds": found[1], "quick": True}


def _keep(key: str, entry: dict[str, Any]) -> None:
    try:
        _write(key, entry)
    except ConfigError as error:
        if str(error) not in _said:
            _said.add(str(error))
            warnings.warn(
                f"{error} What was measured is not kept; every process measures anew. {FILE} names "
                f"another file, {MEASURE}=never leaves it out.",
                stacklevel=4,
            )


def _quickly(
    packed: PackedExperts, gpu: str, timeout: float, deadline: float
) -> tuple[int | None, dict[str, list[float]]] | None:
    """As _first_that_pays(), but until the deadline; from there on the times of the last two calls
    are drawn on as straight lines. None: the time is not enough for two."""
    times: dict[str, list[float]] = {}
    tokens, longest = FEWEST, packed.nbytes / LINK
    if time.perf_counter() + 5 * longest > deadline:
        return None
    _on_gpu(packed, gpu, timeout, *_question(packed, tokens))  # memory and kernels are made
    while tokens <= LARGEST:
        question = _question(packed, tokens)
        brought = _seconds(partial(_on_gpu, packed, gpu, timeout, *question))
        cpu = _seconds(partial(multiply, packed, "cpu", *question))
        times[str(tokens)] = [cpu, brought]
        if brought < cpu:
            return tokens, times
        if time.perf_counter() + 2 * cpu + brought > deadline:
            break
        tokens *= 2
    else:
        return None, times
    return (_drawn_on(times), times) if len(times) > 1 else None


def _drawn_on(times: dict[str, list[float]]) -> int | None:
    """Where the CPU's line meets the GPU's; None: nowhere below LARGEST."""
    (before, (cpu, brought)), (last, (cpu2, brought2)) = list(times.items())[-2:]
    step = int(last) - int(before)
    slope = ((cpu2 - cpu) - (brought2 - brought)) / step  # seconds a token that the CPU falls back
    if slope <= 0:
        return None
    tokens = int(last) + math.ceil((brought2 - cpu2) / slope)
    return tokens if tokens <= LARGEST else None


def _seconds(call: Callable[[], Any]) -> float:
    """Of the best of three calls, or of one that takes long."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        if best > LONG:
            break
    return best


def measure(layer: LayerExperts) -> list[tuple[Part, Crossover]]:
    """Measures the crossover of the layer's CPU parts, keeps it in the file, and uses it.

    Runs calls of up to 4096 tokens on both devices; seconds for a large layer. Raises ConfigError
    if the file cannot be written, or is not such a file.
    """
    found = []
    home = split_rank(layer.home)[1]
    for part in layer.parts:
        if not (home.startswith("cuda") and part.is_cpu and part.op != "torch"):
            continue
        if part.prefill is not None and part.prefill.why not in (THUMB, LOADED, MEASURED):
            continue  # a rule decides
        tokens, times = _first_that_pays(part.packed, home, layer.options.timeout)
        _write(_key(part.packed, home), {"tokens": tokens, "seconds": times})
        part.prefill, part.stream_from = Prefill(home, "cuda", MEASURED), tokens
        found.append((part, Crossover(tokens, MEASURED)))
    layer._arrange()
    return found


def _first_that_pays(
    packed: PackedExperts, gpu: str, timeout: float
) -> tuple[int | None, dict[str, list[float]]]:
    """(tokens, {tokens: [seconds on the CPU, seconds on the GPU]}): doubling until it pays."""
    times: dict[str, list[float]] = {}
    tokens = FEWEST
    while tokens <= LARGEST:
        question = _question(packed, tokens)
        cpu = _best(partial(multiply, packed, "cpu", *question))
        brought = _best(partial(_on_gpu, packed, gpu, timeout, *question))
        times[str(tokens)] = [cpu, brought]
        if brought < cpu:
            return tokens, times
        tokens *= 2
    return None, times


def _question(packed: PackedExperts, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights of a call that spreads over all experts."""
    here = packed.here()
    top_k = min(TOP_K, len(here))
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, packed.hidden_size, generator=generator).bfloat16()
    order = torch.rand(tokens, len(here), generator=generator).argsort(1)[:, :top_k]
    return hidden, torch.tensor(here)[order], torch.full((tokens, top_k), 1 / top_k)


def _on_gpu(packed: PackedExperts, gpu: str, timeout: float, *inputs: Tensor) -> Tensor:
    there = [bring(t, gpu) for t in inputs]
    if virtual.gpu(gpu) is not None:
        ticket = submit(gpu, stream, packed, gpu, "cuda", *there)
        out: Tensor = ticket.wait(timeout, "a measurement")
        return out
    out = stream(packed, gpu, "cuda", *there)
    torch.cuda.synchronize(torch_device(gpu))
    return out


def _best(call: Callable[[], Any], times: int = 3) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def _key(packed: PackedExperts, gpu: str) -> str:
    kind = "virtual" if virtual.gpu(gpu) else torch.cuda.get_device_name(gpu)
    return (
        f"{platform.node()}|{os.cpu_count()} cpus, {torch.get_num_threads()} threads|{kind}|"
        f"{packed.format} {packed.mode}|{len(packed.here())}x{packed.hidden_size}x"
        f"{packed.intermediate_size}"
    )


def _read() -> dict[str, Any]:
    """The entries; none where there is no file yet. With a warning where it is not ours."""
    try:
        return _parse(path())
    except OSError:
        return {}
    except ConfigError as error:
        if str(error) not in _said:
            _said.add(str(error))
            warnings.warn(f"{error} Until then it is not used.", stacklevel=2)
        return {}


_said: set[str] = set()


def _parse(file: Path) -> dict[str, Any]:
    """Raises OSError, and ConfigError for a file that _write() has not made.

    An empty one has nothing in it, as /dev/null has.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8") or "{}")
        problem = "" if isinstance(data, dict) else "an object"
        for entry in data.values() if not problem else ():
            tokens = entry.get("tokens", 0) if isinstance(entry, dict) else 0
            if tokens is not None and (type(tokens) is not int or tokens < 1):
                problem = "of each entry a number of tokens, or null,"
    except ValueError:  # not JSON, or not text
        problem = "JSON"
    if problem:
        raise ConfigError(
            f"{file}: expected {problem} as `expertyard run --measure` writes it. Delete the file, "
            f"or name another one with {FILE}."
        )
    found: dict[str, Any] = data
    return found


def _write(key: str, entry: dict[str, Any]) -> None:
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        before = _parse(file) if file.exists() else {}  # what is not ours is not overwritten
        whole = {**before, key: entry}
        if file.exists() and not file.is_file():  # a device such as /dev/null is not replaced
            file.write_text(json.dumps(whole), encoding="utf-8")
            return
        new = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            new.replace(file)  # two processes that measure do not see half a file
        finally:
            new.unlink(missing_ok=True)  # where the disk is full
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}).") from None
