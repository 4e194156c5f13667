# SPDX-License-Identifier: Apache-2.0
"""Weight formats, as bytes: a format knows its name and the bytes of one matrix. One file a format.

Adding one: a file here that defines FORMAT, and its name in _NAMES. What runs a format (packing,
kernels) lives on the torch side; planning needs only this.
"""

import difflib
from functools import cache
from importlib import import_module

from expertyard.errors import ConfigError
from expertyard.formats.base import Format

__all__ = ["Format", "format_names", "get_format"]

_NAMES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "mxfp4")


def format_names() -> tuple[str, ...]:
    """Names of every format, widest first."""
    return _NAMES


def get_format(name: str) -> Format:
    """The format of that name. Raises ConfigError that lists the known ones."""
    if not isinstance(name, str) or name not in _NAMES:
        near = difflib.get_close_matches(str(name), _NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(_NAMES)
        raise ConfigError(f"format: expected one of {known}; got {name!r}.{hint}")
    return _load(name)


@cache
def _load(name: str) -> Format:
    found = import_module(f"expertyard.formats.{name}").FORMAT
    assert isinstance(found, Format)
    return found
