# SPDX-License-Identifier: Apache-2.0
"""KTransformers' kt-kernel: its engines called directly, as its own wrapper does (the wrapper wants
a GPU or files). A thread that hands out work spins beside the workers, so on a machine where every
core is a worker it fares badly for few tokens: it is measured with as many threads as we have, and
with one fewer.
"""

import atexit
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...formats import get_format
from ...quantize import quantize
from ..layer import Layer
from .base import Parts, Peer, Run, converted, fp8_one_scale, int4_groups, int4_words

_MAX_TOKENS = 4096  # of a call; more than that and it reads beyond its buffers
_GPTQ = "AVX2GPTQInt4_MOE"  # the one engine that takes GPTQ's words
_BITS = {"int4": 4, "mxfp4": 4, "fp8": 8}
# of the first that this kt-kernel has: those for AVX-512, then those for AVX2
_ENGINES = {
    "bf16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "int8": ("AMXInt8_MOE",),
    "int4": ("AMXInt4_KGroup_MOE", _GPTQ),
    "fp8": ("AMXFP8_MOE", "AVX2FP8_MOE"),
    "mxfp4": ("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"),
}


def _absent() -> str | None:
    if find_spec("kt_kernel") is None:
        return "kt-kernel is not installed"
    try:
        engines = _extension().moe
    except Exception as error:  # whatever a foreign library raises at import
        return f"kt-kernel does not import: {error}"
    return None if _engine(engines, "bf16") else "this kt-kernel has no engines for this CPU"


def _engine(engines: Any, base: str) -> str | None:
    """The engine's name, or None: this kt-kernel has none of that format."""
    return next((name for name in _ENGINES[base] if hasattr(engines, name)), None)


def _group(base: str, engine: str) -> int:
    """Values of a scale. The int4 engine for AVX-512 gives infinities with groups of 128."""
    return 128 if base == "fp8" or engine == _GPTQ else 32


@cache
def _extension() -> Any:
    with _quiet():
        import kt_kernel

    atexit.register(_end_pools)
    return kt_kernel.kt_kernel_ext


@cache
def _pool(threads: int) -> Any:
    extension = _extension()
    config = extension.WorkerPoolConfig()
    config.subpool_count = 1
    config.subpool_numa_map = [0]
    config.subpool_thread_count = [threads]
    with _quiet():
        return extension.CPUInfer(config)


def _end_pools() -> None:
    with _quiet():
        _pool.cache_clear()


def _make(spare: int, layer: Layer, base: str, threads: int) -> Run:
    if threads <= spare:
        raise ValueError(f"there is only {threads} thread")
    extension, shape = _extension(), layer.shape
    name_of_engine = _engine(extension.moe, base)
    if name_of_engine is None:
        raise ValueError(f"this kt-kernel has no {base} engine for this CPU")
    group = _group(base, name_of_engine)
    pool = _pool(threads - spare)
    gpu_mask = torch.zeros(shape.num_experts, dtype=torch.bool)
    config = extension.moe.MOEConfig(
        shape.num_experts,
        shape.top_k,
        shape.hidden_size,
        shape.intermediate_size,
        gpu_mask.data_ptr(),
    )
    config.layer_idx = 0
    config.pool = pool.backend_
    config.max_len = _MAX_TOKENS
    convert = _int4_gptq if name_of_engine == _GPTQ else _CONVERT[base]
    experts = list(converted(layer, convert))
    stacks, kept = [], []
    for which, name in enumerate(("gate", "up", "down")):
        matrices = [_finished(name_of_engine, one[which]) for one in experts]
        kept.append(matrices)
        if base == "int8":  # quantised by the engine, from stacked weights
            stacks.append(torch.stack([parts[0] for parts in matrices]))
            setattr(config, f"{name}_proj", stacks[-1].data_ptr())
            continue
        setattr(config, f"{name}_projs", [[parts[0].data_ptr() for parts in matrices]])
        scales = [parts[1].data_ptr() if len(parts) > 1 else 0 for parts in matrices]
        setattr(config, f"{name}_scales", [scales])
    if base in _BITS:
        config.quant_config.bits = _BITS[base]
        config.quant_config.group_size = group
        config.quant_config.zero_point = False
    numbers = torch.arange(shape.num_experts)
    with _quiet():
        engine = getattr(extension.moe, name_of_engine)(config)
        pool.submit(engine.load_weights_task(numbers.data_ptr()))
        pool.sync()
    del stacks, experts, kept  # it has copies of its own now

    def run(
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        read_by_the_engine: tuple[Tensor, ...] = (gpu_mask, numbers),
    ) -> Tensor:
        out = torch.empty_like(hidden_states)
        count = torch.tensor([hidden_states.shape[0]], dtype=torch.int32)
        weights = topk_weights.float()
        task = engine.forward_task(
            count.data_ptr(),
            topk_ids.shape[1],
            topk_ids.data_ptr(),
            weights.data_ptr(),
            hidden_states.data_ptr(),
            out.data_ptr(),
            False,
        )
        pool.submit(task)
        pool.sync()
        return out

    return run


def _mxfp4(weight: Tensor) -> Parts:
    q = quantize(weight, get_format("mxfp4"))
    return _nibbles(q.codes), torch.exp2(q.scales.float() - 127).bfloat16()


def _int4(weight: Tensor) -> Parts:
    codes, scales = int4_groups(weight, 32)
    return _nibbles(codes), scales


def _int4_gptq(weight: Tensor) -> Parts:
    """GPTQ's words, but with rows first."""
    codes, scales = int4_groups(weight, 128)
    return int4_words(codes), scales.float()


def _finished(engine: str, parts: Parts) -> Parts:
    """What no longer has its rows first: int4 as GPTQ has it, fp8's scales by block."""
    if engine == _GPTQ:
        return parts[0].T.contiguous(), parts[1].T.contiguous()
    if engine in _ENGINES["fp8"]:
        return parts[0], parts[1][::128].contiguous()
    return parts


def _nibbles(codes: Tensor) -> Tensor:
    return codes[:, 0::2] | codes[:, 1::2] << 4


_CONVERT: dict[str, Callable[[Tensor], Parts]] = {
    "bf16": lambda weight: (weight,),
    "int8": lambda weight: (weight,),
    "int4": _int4,
    "fp8": fp8_one_scale,
    "mxfp4": _mxfp4,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends what C++ writes to standard output nowhere."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _peer(name: str, spare: int, about: str) -> Peer:
    return Peer(
        name=name,
        about=about,
        beside={base: base for base in _ENGINES},
        make=partial(_make, spare),
        # its copy, and ours to make it from
        bytes_per_weight={"bf16": 4, "int8": 5, "int4": 3.2, "fp8": 2.2, "mxfp4": 3.2},
        absent=_absent,
        settle=0.08,
    )


PEERS: Sequence[Peer] = (
    _peer("kt_kernel", 0, "kt-kernel's engines, as many threads as we have"),
    _peer("kt_kernel_spare", 1, "the same with one thread fewer, a core for the one that spins"),
)
