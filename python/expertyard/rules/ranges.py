# SPDX-License-Identifier: Apache-2.0
"""Lists of numbers as people write them: "0-7", "3,7,11", "0-3,8"."""

from __future__ import annotations

import re
from collections.abc import Iterable

from expertyard.errors import RuleError

MAX_NUMBER = 1_000_000


def parse_ids(text: str, what: str) -> tuple[int, ...]:
    """'0-3,8' -> (0, 1, 2, 3, 8), sorted. Ends are inclusive. Raises RuleError quoting the part."""
    ids: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None:
            raise RuleError(f"{what}: expected numbers and ranges such as 0-3,8; got {part!r}.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RuleError(f"{what}: the range {part.strip()!r} ends before it starts.")
        if last > MAX_NUMBER:
            raise RuleError(f"{what}: {last} is no expert or layer number.")
        ids.update(range(first, last + 1))
    return tuple(sorted(ids))


def format_ids(ids: Iterable[int]) -> str:
    """(0, 1, 2, 3, 8) -> '0-3,8'."""
    parts: list[str] = []
    first = last = None
    for number in sorted(set(ids)):
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None:
            parts.append(f"{first}-{last}" if last != first else f"{first}")
        first = last = number
    if first is not None:
        parts.append(f"{first}-{last}" if last != first else f"{first}")
    return ",".join(parts)
