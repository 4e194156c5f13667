# SPDX-License-Identifier: Apache-2.0
"""A layer's experts on the GPU, ours in a format or a peer's in bf16, and how long a call takes.

Weights are random bits with sane scales: `tests` is where results are checked, against float64,
and where the packer is used; packing 256 real experts would take longer than measuring them. Calls
rotate over routings, so that the weights of one are not in L2 when the next begins.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertyard import PackedExperts
from expertyard.bench.shapes import SHAPES, Shape
from expertyard.formats import get_format
from expertyard.packing import packed_bytes, scale_type_of
from expertyard.reference import moe_experts_reference
from expertyard.testing import Problem, random_ids
from expertyard.weights import Blobs

from . import peers, quantised_peers
from .quantised_peers import BYTES_OF_A_WEIGHT

CALLS = 16  # routings that a graph rotates over, for few tokens
FEW_TOKENS = 64
PEER_TOLERANCE = 2e-2  # relative L2 error of a peer's bf16 result
FP8_TOLERANCE = 4e-2  # of one that rounds h to e4m3: other sums, other codes here and there
FORCED = "EXPERTYARD_CUDA_KERNELS"
STEP_BYTES = 128  # of csrc/blocks.h
HEAD_BYTES = {"none": 0, "bf16": 64, "fp16": 64, "e8m0": 64, "fp32": 128}
ROOT_MEAN_SQUARE = {"int8": 74.0, "int4": 4.6, "fp8": 110.0, "mxfp4": 2.9}  # of random codes
STEP_K = {"bf16": 2, "int8": 4, "fp8": 4, "int4": 8, "mxfp4": 8}

Run = peers.Run
Seconds = Callable[[Sequence[Callable[[], object]]], float]


@dataclass
class Layer:
    shape: Shape
    expert_bytes: int
    run: Run
    kernel: Callable[[int], str]
    seconds: Seconds

    def measure(self, num_tokens: int, routing: str) -> dict[str, Any]:
        s = self.shape
        count = CALLS if num_tokens <= FEW_TOKENS else 4 if num_tokens <= 1024 else 2
        torch.manual_seed(num_tokens)
        x = torch.randn(num_tokens, s.hidden_size, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(num_tokens, s.top_k, device="cuda")
        ids = [random_ids(num_tokens, s.num_experts, s.top_k, routing) for _ in range(count)]
        touched = sum(int(i.unique().numel()) for i in ids) / count * self.expert_bytes
        on_card = [i.cuda() for i in ids]
        seconds = self.seconds([lambda i=i: self.run(x, i, weights) for i in on_card])
        return {
            "us": round(seconds * 1e6, 2),
            "weight_tb_per_s": round(touched / seconds / 1e12, 4),
            "tflops": round(s.flops(num_tokens) / seconds / 1e12, 2),
            "kernel": self.kernel(num_tokens),
        }

    def measure_with(self, family: str, num_tokens: int) -> dict[str, Any] | None:
        """The same by one family of kernels; None: it does not serve such calls."""
        before = os.environ.get(FORCED)
        os.environ[FORCED] = family
        try:
            return self.measure(num_tokens, "uniform")
        except RuntimeError as error:
            if "do not serve this call" not in str(error):
                raise
            return None
        finally:
            if before is None:
                del os.environ[FORCED]
            else:
                os.environ[FORCED] = before


def make(shape_name: str, contender: str, seconds: Seconds) -> Layer | str | None:
    """None or a sentence: this contender is not on this machine, or its weights do not fit."""
    shape = SHAPES[shape_name]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    peer = contender in peers.MAKERS or contender in quantised_peers.MAKERS
    plain = peer or contender == "bf16-rows"
    format, _, mode = contender.partition(" ")
    expert_bytes = (
        int(BYTES_OF_A_WEIGHT.get(contender, 2) * shape.expert_params)
        if plain
        else sum(packed_bytes(format, shape.hidden_size, shape.intermediate_size))
    )
    # a peer makes its weights from bf16 ones
    if (2 * shape.expert_params if peer else expert_bytes) * shape.num_experts > 0.8 * free:
        return "its weights do not fit"
    if peer:
        if contender in quantised_peers.MAKERS:
            found = checked_quantised_peer(shape, contender, _rows(shape))
            if isinstance(found, str):
                return found
            run: Run | None = found
        else:
            run = checked_peer(shape, contender, _rows(shape))
        return run and Layer(shape, expert_bytes, run, lambda num_tokens: contender, seconds)
    plain_rows = contender == "bf16-rows"
    packed = _rows(shape).pack() if plain_rows else _blocks(shape, format, mode or "exact")
    op = torch.ops.expertyard.moe_experts

    def ours(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = op(x, ids, weights, packed.handle)
        return out

    def kernel(num_tokens: int) -> str:
        return packed.kernel_name(num_tokens, torch.bfloat16, shape.top_k)

    return Layer(shape, expert_bytes, ours, kernel, seconds)


def _rows(shape: Shape) -> Problem:
    """bf16 weights as Hugging Face has them."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16) / size[-1] ** 0.5

    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    nothing = torch.empty(0, device="cuda")
    return Problem(
        nothing, nothing, nothing, normal(e, 2 * i, h), normal(e, h, i),
        torch.zeros(e, 2 * i, device="cuda") if shape.bias else None,
        torch.zeros(e, h, device="cuda") if shape.bias else None,
        shape.activation, interleaved=shape.activation == "swigluoai",
    )  # fmt: skip


def random_blob(base: str, scale: str, group: int, zeros: bool, k: int, size: int, device: str
) -> Tensor:  # fmt: skip
    """uint8 [size]: blocks with random weights, and scales that make them about 1 / sqrt(k)."""
    blob = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    if base == "bf16":  # random bits would be NaN now and then
        values = blob.view(torch.bfloat16)
        values.normal_(0, k**-0.5)
        return blob
    if base == "fp8":  # not e4m3's NaN
        blob[(blob & 127) == 127] -= 1
    line_k = (group or k) * (2 if scale == "e8m0" else 1)
    padded = -(-k // line_k) * line_k if scale == "e8m0" else -(-k // STEP_K[base]) * STEP_K[base]
    head = HEAD_BYTES[scale] * (2 if zeros else 1)
    lines = -(-padded // line_k)
    blocks = blob.view(-1, lines * head + padded // STEP_K[base] * STEP_BYTES)
    value = k**-0.5 / ROOT_MEAN_SQUARE[base]
    for line in range(lines):
        at = line * (head + line_k // STEP_K[base] * STEP_BYTES)
        where = blocks[:, at : at + head]
        if scale == "e8m0":
            where.fill_(127 + round(math.log2(value)))
            continue
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[scale]
        width = HEAD_BYTES[scale]
        one = torch.tensor([value], dtype=dtype, device=device).view(torch.uint8)
        where[:, :width] = one.repeat(width // one.numel())
        if zeros:
            eight = torch.tensor([8.0], dtype=dtype, device=device).view(torch.uint8)
            where[:, width:] = eight.repeat(width // eight.numel())
    return blob


def _blocks(shape: Shape, format: str, mode: str) -> PackedExperts:
    f = get_format(format)
    scale = scale_type_of(f)
    h, i = shape.hidden_size, shape.intermediate_size
    group = 0 if f.base == "bf16" else f.group_size
    blobs: tuple[list[Tensor | None], list[Tensor | None]] = ([], [])
    for out, k, size in zip(blobs, (h, i), packed_bytes(format, h, i), strict=True):
        for _ in range(shape.num_experts):
            out.append(random_blob(f.base, scale, group, f.asymmetric, k, size, "cuda"))
    zeros = torch.zeros(shape.num_experts, max(h, i), device="cuda")
    biases = {
        "gate_bias": [*zeros[:, :i]],
        "up_bias": [*zeros[:, :i]],
        "down_bias": [*zeros[:, :h]],
    }
    return PackedExperts.from_blobs(
        Blobs(f, scale, h, i, *blobs), activation=shape.activation, mode=mode,
        **(biases if shape.bias else {}),
    )  # fmt: skip


def checked_peer(shape: Shape, name: str, weights: Problem) -> Run | None:
    """The peer, once it has computed a small call right. RuntimeError if it has not."""
    run = peers.make(name, shape, weights)
    if run is None:
        return None
    device = weights.down.device
    torch.manual_seed(1)
    x = torch.randn(4, shape.hidden_size, device=device, dtype=torch.bfloat16)
    ids = random_ids(4, shape.num_experts, shape.top_k, "uniform").to(device)
    topk_weights = torch.rand(4, shape.top_k, device=device)
    expected = moe_experts_reference(
        x, ids, topk_weights, weights.gate_up, weights.down,
        gate_up_bias=weights.gate_up_bias, down_bias=weights.down_bias,
        activation=weights.activation, interleaved=weights.interleaved, dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        error = float((run(x, ids, topk_weights) - expected).norm() / expected.norm())
    if not error <= PEER_TOLERANCE:
        raise RuntimeError(f"{name} on {shape.name}: relative error {error:.3g} in a call of 4")
    return run


def checked_quantised_peer(shape: Shape, name: str, weights: Problem) -> Run | str:
    """The same of a peer that packs weights for itself; a sentence instead of any error."""
    if shape.activation != "silu":
        return f"{name}: not with {shape.activation}"
    device = weights.down.device
    torch.manual_seed(1)
    x = torch.randn(4, shape.hidden_size, device=device, dtype=torch.bfloat16)
    ids = random_ids(4, shape.num_experts, shape.top_k, "uniform").to(device)
    topk_weights = torch.rand(4, shape.top_k, device=device)
    try:
        peer = quantised_peers.MAKERS[name](weights)
        with torch.no_grad():
            out = peer.run(x, ids, topk_weights).float()
    except Exception as error:  # other people's code: whatever goes wrong there is the reason
        return quantised_peers.reason_of(name, error)
    expected = moe_experts_reference(
        x, ids % 2, topk_weights, peer.gate_up, peer.down, dtype=torch.float32,
        rounding=peer.rounding,
    )  # fmt: skip
    error_of = float((out - expected).norm() / expected.norm())
    most = FP8_TOLERANCE if peer.rounding else PEER_TOLERANCE
    if not error_of <= most:
        return f"{name}: relative error {error_of:.3g} in a call of 4"
    return peer.run
