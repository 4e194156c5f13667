# SPDX-License-Identifier: Apache-2.0
"""Of a test's many cases some are run at every change, all of them every night."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def soon(some: Collection[str], cases: Iterable[str]) -> list[Any]:
    """Parameters for a test: those not in `some` are slow."""
    return [pytest.param(case, marks=() if case in some else pytest.mark.slow) for case in cases]
