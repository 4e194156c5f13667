# SPDX-License-Identifier: Apache-2.0
"""Tests start Python processes of their own: those find the package where this one has found it."""

import os
from pathlib import Path

import expertyard

_package = str(Path(expertyard.__file__).resolve().parents[1])
os.environ["EXPERTYARD_CROSSOVERS"] = os.devnull  # what this machine has measured is no matter
os.environ["PYTHONPATH"] = os.pathsep.join(
    p for p in (_package, os.environ.get("PYTHONPATH", "")) if p
)
