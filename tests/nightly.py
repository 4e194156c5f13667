# SPDX-License-Identifier: Apache-2.0
"""Bugs that tests plant in the sources: some are looked for at every change, all every night."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def soon(some: Collection[str], bugs: Iterable[str]) -> list[Any]:
    """Parameters for a test: those not in `some` are slow."""
    return [pytest.param(bug, marks=() if bug in some else pytest.mark.slow) for bug in bugs]
