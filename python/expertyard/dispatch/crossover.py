# SPDX-License-Identifier: Apache-2.0
"""From how many tokens on it pays to bring a layer's CPU experts to a GPU for one call.

Measured once per machine, GPU, shape and format, and kept in a file; until then a fixed rule of
thumb, from assumed speeds:

    tokens = bytes of the experts / kLink * kArithmetic / (6 * top_k * H * I)

the calls that last as long on the CPU (its arithmetic alone) as the weights are on their way. The
GPU's arithmetic is hidden behind the copies (streaming.py), and far shorter.
"""

import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import virtual
from ..devices import torch_device
from ..errors import ConfigError
from ..weights import PackedExperts
from .copies import bring, multiply
from .lanes import submit
from .layer import LayerExperts, Part
from .placement import Prefill, split_rank
from .streaming import stream

__all__ = ["Crossover", "choose", "measure", "path"]

LINK = 20e9  # bytes/s from host memory to a GPU: PCIe 4.0 x16, as it is reached
ARITHMETIC = 1e12  # multiply-adds and adds a second of a CPU of 16 cores or so
FILE = "EXPERTYARD_CROSSOVERS"
LARGEST = 4096  # tokens that are tried when measuring
TOP_K = 8  # that the rule of thumb and the measurement take


@dataclass(frozen=True)
class Crossover:
    """tokens  of a call from which the weights go to the GPU; None: never
    measured  False: the rule of thumb"""

    tokens: int | None
    measured: bool

    @property
    def why(self) -> str:
        return "measured" if self.measured else "rule of thumb"


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
    """What is in the file, else the rule of thumb."""
    entry = _read().get(_key(packed, gpu))
    if entry is not None:
        return Crossover(entry["tokens"], True)
    flops = 6 * TOP_K * packed.hidden_size * packed.intermediate_size
    if virtual.gpu(gpu) is not None:
        return Crossover(None, False)  # the same cores: nothing is won by a copy
    return Crossover(max(32, int(packed.nbytes / LINK * ARITHMETIC / flops)), False)


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
        if part.prefill is not None and part.prefill.why not in ("measured", "rule of thumb"):
            continue  # a rule decides
        tokens, times = _first_that_pays(part.packed, home, layer.options.timeout)
        _write(_key(part.packed, home), {"tokens": tokens, "seconds": times})
        part.prefill, part.stream_from = Prefill(home, "cuda", "measured"), tokens
        found.append((part, Crossover(tokens, True)))
    layer._arrange()
    return found


def _first_that_pays(
    packed: PackedExperts, gpu: str, timeout: float
) -> tuple[int | None, dict[str, list[float]]]:
    """(tokens, {tokens: [seconds on the CPU, seconds on the GPU]}): doubling until it pays."""
    times: dict[str, list[float]] = {}
    tokens = 32
    here = packed.here()
    generator = torch.Generator().manual_seed(0)
    while tokens <= LARGEST:
        top_k = min(TOP_K, len(here))
        hidden = torch.randn(tokens, packed.hidden_size, generator=generator).bfloat16()
        order = torch.rand(tokens, len(here), generator=generator).argsort(1)[:, :top_k]
        ids = torch.tensor(here)[order]
        weights = torch.full((tokens, top_k), 1 / top_k)
        cpu = _best(partial(multiply, packed, "cpu", hidden, ids, weights))
        brought = _best(partial(_on_gpu, packed, gpu, timeout, hidden, ids, weights))
        times[str(tokens)] = [cpu, brought]
        if brought < cpu:
            return tokens, times
        tokens *= 2
    return None, times


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
            warnings.warn(f"{error} Until then the rule of thumb holds.", stacklevel=2)
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
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        new.replace(file)  # two processes that measure do not see half a file
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}).") from None
