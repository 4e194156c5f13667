# SPDX-License-Identifier: Apache-2.0
"""What a peer is: someone else's way to compute the same layer, and when it can run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ...reference import apply_activation
from ..layer import Layer

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_states, topk_ids, topk_weights -> out

# Largest relative L2 error against float64 on the unquantised weights that is no mistake.
TOLERANCE = {"bf16": 2e-2, "int8": 6e-2, "fp8": 8e-2, "int4": 0.35, "mxfp4": 0.35}


def package_folder(name: str) -> Path | None:
    """Where an installed package lies; None: it is not installed. Nothing is imported."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


EVERYTHING = dict.fromkeys(("bf16", "int8", "int4", "fp8", "mxfp4"), "bf16")


@dataclass(frozen=True)
class Peer:
    """One contender beside ours.

    name       as in tables, in the JSON and after --peers
    about      one line: whose code it is and how it is called
    beside     base of the format that is measured -> base of the weights that the peer has
    make       (layer, base of its weights, threads) -> callable; raises what it likes
    absent     () -> None, or why it cannot run in this process
    bytes_per_weight  by base of its weights: what make() keeps, for the memory of the run
    activations       that it knows
    settle     seconds after which its threads have stopped spinning
    """

    name: str
    about: str
    beside: Mapping[str, str]
    make: Callable[[Layer, str, int], Run]
    bytes_per_weight: Mapping[str, float]
    absent: Callable[[], str | None] = lambda: None
    activations: tuple[str, ...] = ("silu",)
    settle: float = 0.03

    def needs(self, layer: Layer, base: str) -> float:
        """Bytes that it holds, and as many weights again of one expert while it is made."""
        weights = layer.shape.expert_params
        own = self.bytes_per_weight[self.beside[base]]
        return weights * (layer.shape.num_experts * own + 8)


Parts = tuple[Tensor, ...]  # of one matrix, each with its rows first: codes, scales


def converted(
    layer: Layer, convert: Callable[[Tensor], Parts]
) -> Iterator[tuple[Parts, Parts, Parts]]:
    """gate, up and down of each expert, converted from bf16: the template is, once."""
    template = [convert(matrix) for matrix in layer.template.matrices()]
    for expert in range(layer.shape.num_experts):
        w13, w2 = layer.shifts(expert)
        gate, up, down = (
            tuple(part.roll(by, 0) for part in parts)
            for parts, by in zip(template, (w13, w13, w2), strict=True)
        )
        yield gate, up, down


def joined(a: Parts, b: Parts, interleaved: bool = False) -> Parts:
    """Rows of a, then rows of b; or a0, b0, a1, b1 ..."""
    pairs = zip(a, b, strict=True)
    if interleaved:
        return tuple(torch.stack(pair, 1).flatten(0, 1) for pair in pairs)
    return tuple(torch.cat(pair) for pair in pairs)


def int8_rows(weight: Tensor) -> Parts:
    """int8 codes [out, in] and fp32 scales [out]."""
    rows = weight.float()
    scales = rows.abs().amax(1).clamp(min=1e-12) / 127
    return (rows / scales[:, None]).round().to(torch.int8), scales


def int4_groups(weight: Tensor, group: int) -> Parts:
    """Codes 0 to 15 in uint8 [out, in], the code of zero is 8; bf16 scales [out, in / group]."""
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(2, keepdim=True).clamp(min=1e-12) / 7).bfloat16()
    codes = (groups / scales.float()).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).flatten(1), scales.squeeze(2)


def int4_words(codes: Tensor) -> Tensor:
    """GPTQ's words: eight codes of a row in an int32 [out, in / 8]."""
    eights = codes.to(torch.int32).unflatten(1, (-1, 8))
    words = torch.zeros(eights.shape[:2], dtype=torch.int32)
    for i in range(8):
        words |= eights[:, :, i] << 4 * i
    return words


def fp8_one_scale(weight: Tensor) -> Parts:
    """e4m3 codes, and one scale for all as if each block of 128 columns had it: it can be moved
    with the rows."""
    scale = weight.float().abs().amax() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale.expand(
        weight.shape[0], weight.shape[1] // 128
    ).contiguous()


Linear = Callable[[int, Tensor], Tensor]  # expert, [tokens, in] -> [tokens, out]


def by_expert(layer: Layer, gate_up: Linear, down: Linear, dtype: torch.dtype) -> Run:
    """The loop that everyone writes: tokens sorted by expert, two linears of each.

    gate_up gives gate's columns, then up's. dtype: of what the linears take.
    """
    top_k = layer.shape.top_k
    activation = layer.shape.activation

    def run(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        x = hidden_states.to(dtype)
        out = torch.zeros(x.shape, dtype=torch.float32)
        order = topk_ids.flatten().argsort()
        weights = topk_weights.flatten()[order, None].float()
        tokens = order // top_k
        counts = topk_ids.flatten().bincount(minlength=layer.shape.num_experts).tolist()
        begin = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            here = slice(begin, begin + count)
            begin += count
            g, u = gate_up(expert, x[tokens[here]]).chunk(2, -1)
            if layer.gate_bias is not None and layer.up_bias is not None:
                g, u = g + layer.gate_bias[expert].to(dtype), u + layer.up_bias[expert].to(dtype)
            if activation == "silu":
                h = torch.nn.functional.silu(g) * u
            else:
                h = apply_activation(g, u, activation)
            y = down(expert, h.to(dtype))
            if layer.down_bias is not None:
                y = y + layer.down_bias[expert].to(dtype)
            out.index_add_(0, tokens[here], y.float() * weights[here])
        return out.to(hidden_states.dtype)

    return run
