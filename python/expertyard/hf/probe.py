# SPDX-License-Identifier: Apache-2.0
"""What an experts module computes between its projections, found by trying: random numbers go
through the module's own gate or activation and through ours, and only agreement counts."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import KernelError
from ..reference import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT, apply_activation

__all__ = ["Arithmetic", "probe_gate", "probe_plain"]

Arithmetic = tuple[str, float, float]  # activation, alpha, limit

_DEFAULTS = (SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT)
_SUPPORTED = (
    "silu(gate) * up, with and without limits, gelu_tanh(gate) * up, gpt-oss' clamped (up + 1) * "
    "gate * sigmoid(alpha * gate), and soft-capped silu(gate) * up"
)


def probe_gate(
    module: nn.Module, who: str, interleaved: bool, apply: Callable[[Tensor], Tensor] | None = None
) -> Arithmetic:
    """Of a module with a gate.

    apply  [n, 2m] -> [n, m]; by default the module's _apply_gate
    Raises KernelError if it computes nothing that our kernels do.
    """
    gate, up = _numbers(0), _numbers(1)
    joined = torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1)
    got = _try(apply or module._apply_gate, joined, who)  # type: ignore[arg-type]
    for found in _gated(module):
        if _agree(got, apply_activation(gate, up, *found)):
            return found
    raise KernelError(
        f"{who}: on random numbers its gate computes none of {_SUPPORTED}. No kernel of ours "
        "computes what it does yet, so its experts stay with transformers."
    )


def probe_plain(module: nn.Module, who: str) -> Arithmetic:
    """Of a module without a gate, by its act_fn. Raises KernelError likewise."""
    up = _numbers(1)
    if _agree(_try(module.act_fn, up, who), apply_activation(None, up, "relu2")):  # type: ignore[arg-type]
        return ("relu2", *_DEFAULTS)
    raise KernelError(
        f"{who}: it has no gate, and on random numbers its activation is not max(x, 0)^2, the only "
        "one that our kernels compute without a gate. Its experts stay with transformers."
    )


def _numbers(seed: int) -> Tensor:
    """From everyday values to far beyond any limit: 0.1 to 1000, both signs."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        size = torch.empty(256, 32, dtype=torch.float64).uniform_(-1, 3, generator=generator)
        return 10**size * torch.randn(256, 32, generator=generator, dtype=torch.float64)


def _try(function: Callable[[Tensor], Tensor], numbers: Tensor, who: str) -> Tensor:
    try:
        with torch.no_grad(), torch.device("cpu"):
            return function(numbers)
    except Exception as error:
        raise KernelError(
            f"{who}: its gate cannot be tried on random numbers ({error}), so it cannot be "
            "recognised safely."
        ) from error


def _agree(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got.double(), expected, 1e-5, 1e-5)


def _gated(module: nn.Module) -> Iterator[Arithmetic]:
    """What the module might compute, by the numbers that families keep in its attributes."""
    for activation in ("silu", "gelu_tanh", "swigluoai"):
        yield (activation, *_DEFAULTS)
    alpha = _number(module, "alpha", "swiglu_alpha")
    limit = _number(module, "limit", "swiglu_limit")
    if limit is not None and limit > 0:
        if alpha:
            yield "swigluoai", alpha, limit
        for activation in ("silu_clamp_before", "silu_clamp_after"):
            yield activation, SWIGLU_OAI_ALPHA, limit
    caps = [
        _number(getattr(getattr(module, "act_fn", None), name, None), "softcap")
        for name in ("gate_softcap", "up_softcap")
    ]
    if caps[0] and caps[1]:
        yield "softcap_silu", caps[0], caps[1]


def _number(owner: object, *names: str) -> float | None:
    for name in names:
        if isinstance(found := getattr(owner, name, None), int | float):
            return float(found)
    return None
