# SPDX-License-Identifier: Apache-2.0
"""Weight formats, as bytes: a format knows its name and the bytes of one matrix. One file a format.

Adding one: a file here that defines FORMAT (and VARIANTS, by what is added to its name: "g32"), and
its name in _NAMES. What runs a format (packing, kernels) lives on the torch side; planning needs
only this.
"""

import difflib
from functools import cache
from importlib import import_module

from expertyard.errors import ConfigError
from expertyard.formats.base import Format

__all__ = ["Format", "format_names", "get_format", "variant_names"]

_NAMES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "mxfp4")


def format_names() -> tuple[str, ...]:
    """Names of every format, widest first, without their variants."""
    return _NAMES


def variant_names(name: str) -> tuple[str, ...]:
    """Every spelling of a format's variants: "int4-g32", "int4-g128-asym" ..."""
    return tuple(f"{name}-{suffix}" for suffix in _variants(name))


def get_format(name: str) -> Format:
    """The format of that name. Raises ConfigError that lists the known ones."""
    base, _, suffix = name.partition("-") if isinstance(name, str) else ("", "", "")
    if base not in _NAMES:
        near = difflib.get_close_matches(str(name), _NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(_NAMES)
        raise ConfigError(f"format: expected one of {known}; got {name!r}.{hint}")
    if not suffix:
        return _load(base)
    if suffix not in _variants(base):
        known = ", ".join((base, *variant_names(base)))
        raise ConfigError(f"format: expected one of {known}; got {name!r}.")
    return _variants(base)[suffix]


@cache
def _load(name: str) -> Format:
    found = import_module(f"expertyard.formats.{name}").FORMAT
    assert isinstance(found, Format)
    return found


@cache
def _variants(name: str) -> dict[str, Format]:
    return dict(getattr(import_module(f"expertyard.formats.{name}"), "VARIANTS", {}))
