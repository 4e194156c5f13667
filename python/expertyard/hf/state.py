# SPDX-License-Identifier: Apache-2.0
"""What Expertyard has promised about a model: kept on the model, read by verify() and detach()."""

from dataclasses import dataclass, field

from torch import nn

from ..dispatch import Placement, RunOptions
from ..loading import ExpertsLayout
from ..plan import Plan

__all__ = ["Promise", "Promised", "forget", "promise_of", "remember"]

_ATTRIBUTE = "_expertyard"


@dataclass(frozen=True)
class Promised:
    """One experts module. placement is the plan's; None where no plan was made.

    home  where its parameters were when it was attached; None if it has none (road A)
    """

    name: str
    layer: int
    layout: ExpertsLayout
    placement: Placement | None = None
    home: str | None = None


@dataclass(frozen=True)
class Promise:
    """All experts modules of a model. road: "load" (ExpertsConfig) or "attach"."""

    road: str
    plan: Plan | None
    layers: tuple[Promised, ...]
    options: RunOptions = field(default_factory=RunOptions)


def remember(model: nn.Module, promise: Promise) -> None:
    model.__dict__[_ATTRIBUTE] = promise


def promise_of(model: nn.Module) -> Promise | None:
    promise = model.__dict__.get(_ATTRIBUTE)
    return promise if isinstance(promise, Promise) else None


def forget(model: nn.Module) -> None:
    model.__dict__.pop(_ATTRIBUTE, None)
