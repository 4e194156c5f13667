# SPDX-License-Identifier: Apache-2.0
"""How a plan is run: what is not placement. Keywords of ExpertsConfig beside those of a plan."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError

__all__ = ["POLICIES", "RunOptions"]

POLICIES = ("static", "lru", "frequency")


@dataclass(frozen=True)
class RunOptions:
    """search          True: where weights are quantised, look for the scales with the least squared
                       error; slower to load
    mode            what CPU kernels do with activations of int8, int4 and mxfp4 experts: "exact",
                       as they are, "fast", rounded to 8 bits in groups of 128, or "auto": fast
                       where the CPU multiplies 8-bit integers, because perplexity cannot tell
                       the two apart (docs/accuracy.md)
    policy          "static": experts stay where the plan puts them. "lru", "frequency": each
                       layer's GPU experts are slots for those that were needed last, or most
    out_of_memory      "error", or "cpu": experts for which a GPU has no room go back to the CPU
    timeout            seconds that a device may take for its part of a layer
    prefill_tokens     tokens of a call from which a rule's prefill_op and prefill_device are taken
    tokens             what processes that share experts compute: the "same" tokens, or each "own"
                       ones (docs/dispatch.md)
    dense              quantised layers of a checkpoint that are no experts: "keep" the format
                       that experts of such a checkpoint get, or make all of them "plain"
    defer              experts of a token, the least weighted ones on the CPU, that may finish one
                       layer later; changes results (expertyard run --defer says by how much)
    """

    search: bool = False
    mode: str = "auto"
    policy: str = "static"
    out_of_memory: str = "error"
    timeout: float = 60.0
    prefill_tokens: int = 32
    tokens: str = "same"
    handoff: str = "auto"
    dense: str = "keep"
    defer: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.search, bool):
            raise ConfigError(f"search: expected True or False, got {self.search!r}.")
        _one_of("mode", self.mode, ("auto", "exact", "fast"))
        _one_of("policy", self.policy, POLICIES)
        _one_of("out_of_memory", self.out_of_memory, ("error", "cpu"))
        _one_of("tokens", self.tokens, ("same", "own"))
        _one_of("dense", self.dense, ("keep", "plain"))
        _one_of("handoff", self.handoff, ("auto", "flag", "host"))
        if (
            isinstance(self.timeout, bool)
            or not isinstance(self.timeout, int | float)
            or not 0 < self.timeout < 1e6
        ):
            raise ConfigError(f"timeout: expected seconds above 0, got {self.timeout!r}.")
        for name, least in (("prefill_tokens", 1), ("defer", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}: expected a whole number from {least}, got {value!r}.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunOptions":
        """From keywords. Raises ConfigError."""
        for key in values:
            if key not in cls.names():
                near = difflib.get_close_matches(str(key), cls.names(), 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown option {key!r}.{hint}")
        return cls(**values)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(known)}; got {value!r}.{hint}")
