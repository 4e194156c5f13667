# SPDX-License-Identifier: Apache-2.0
"""Which experts are popular: a profile of counts, or a routing trace, from JSON or CSV.

profile  [[count per expert] per layer], {"counts": that}, {"3": [counts], ...}, or CSV lines
         layer,expert,count
trace    {"tokens": [[[expert ids] per MoE layer] per token]}, or CSV lines token,layer,expert
Rows are layers of the model, or its MoE layers only; a layer without counts is uniform.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertyard.errors import RuleError
from expertyard.spec import ModelSpec

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Profile:
    """`weights`: layer -> chance per expert that one token reads it. `tokens`: the trace, if it is
    one.

    A token is a map of layer -> expert ids.
    """

    weights: Mapping[int, tuple[float, ...]]
    tokens: tuple[Mapping[int, tuple[int, ...]], ...] = ()


def read_profile(source: Any, spec: ModelSpec) -> Profile:
    """The profile of a file or of data in that form. Raises RuleError naming layer and expert."""
    name = "--profile"
    data = source
    if isinstance(source, str | Path):
        name = str(source)
        data = _load(Path(source))
    if isinstance(data, Mapping) and "tokens" in data:
        return _trace(_token_rows(data["tokens"], name, spec), name, spec)
    if isinstance(data, _Rows):
        if data.header[0] == "token":
            return _trace(_token_lines(data, name), name, spec)
        return _profile(_count_lines(data, name, spec), name, spec)
    if isinstance(data, Mapping):
        data = next((data[k] for k in ("counts", "logical_count") if k in data), data)
    return _profile(_count_rows(data, name, spec), name, spec)


@dataclass(frozen=True)
class _Rows:
    """Lines of a CSV file as numbers, with the columns' names."""

    header: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RuleError(f"{path}: more than {MAX_BYTES >> 20} MiB; sample the trace.")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RuleError(f"{path}: no such file.") from None
    except OSError as error:
        raise RuleError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError:
        raise RuleError(f"{path}: not a text file; a profile is JSON or CSV.") from None
    if text.lstrip()[:1] in "[{":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise RuleError(f"{path}: not JSON.") from None
    return _csv(text, str(path))


def _csv(text: str, name: str) -> _Rows:
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    header = tuple(cell.strip().lower() for cell in lines[0]) if lines else ()
    if header not in (("layer", "expert", "count"), ("token", "layer", "expert")):
        raise RuleError(
            f"{name}:1: expected JSON, or CSV with the columns layer,expert,count (a profile) or "
            "token,layer,expert (a trace)."
        )
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(tuple(float(cell) for cell in line))
            if not all(map(math.isfinite, rows[-1])):
                raise ValueError
        except ValueError:
            raise RuleError(
                f"{name}:{number}: expected three numbers, got {','.join(line)}."
            ) from None
        if len(line) != 3:
            raise RuleError(f"{name}:{number}: expected three numbers, got {len(line)}.")
    return _Rows(header, tuple(rows))


def _row_layers(rows: Sequence[Any], name: str, spec: ModelSpec) -> Sequence[int]:
    """Layer of each row: rows are all layers, or the MoE layers."""
    for layers in (range(spec.num_layers), spec.moe_layers):
        if len(rows) == len(layers):
            return layers
    raise RuleError(
        f"{name}: expected {spec.num_layers} rows (layers) or {len(spec.moe_layers)} (MoE layers) "
        f"for {spec.name}, got {len(rows)}."
    )


def _count_rows(data: Any, name: str, spec: ModelSpec) -> dict[int, list[float]]:
    if isinstance(data, Mapping):
        try:
            pairs = [(int(layer), row) for layer, row in data.items()]
        except (TypeError, ValueError):
            raise RuleError(f"{name}: expected layer numbers as keys.") from None
    elif isinstance(data, list):
        pairs = list(zip(_row_layers(data, name, spec), data, strict=True))
    else:
        raise RuleError(f"{name}: expected rows of counts, one a layer.")
    counts = {}
    for layer, row in pairs:
        num_experts = _num_experts(layer, name, spec)
        if isinstance(row, list) and not any(row) and not num_experts:
            continue  # a dense layer's row
        if not isinstance(row, list) or len(row) != num_experts:
            raise RuleError(f"{name}: layer {layer}: expected {num_experts} counts, one an expert.")
        counts[layer] = [_count(value, name, layer, e) for e, value in enumerate(row)]
    return counts


def _num_experts(layer: int, name: str, spec: ModelSpec) -> int:
    if not 0 <= layer < spec.num_layers:
        raise RuleError(
            f"{name}: layer {layer}: {spec.name} has layers 0 to {spec.num_layers - 1}."
        )
    shape = spec.layers[layer].experts
    return shape.num_experts if shape else 0


def _count(value: Any, name: str, layer: int, expert: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"{name}: layer {layer}, expert {expert}: expected a count, got {value!r}.")
    if not (0 <= value < math.inf):
        raise RuleError(f"{name}: layer {layer}, expert {expert}: expected a count, got {value}.")
    return float(value)


def _count_lines(data: _Rows, name: str, spec: ModelSpec) -> dict[int, list[float]]:
    counts: dict[int, list[float]] = {}
    for number, (layer, expert, count) in enumerate(data.rows, 2):
        where = f"{name}:{number}"
        num_experts = _num_experts(int(layer), where, spec)
        if not 0 <= expert < num_experts:
            raise RuleError(
                f"{where}: layer {layer:.0f} has {num_experts} experts, got {expert:.0f}."
            )
        row = counts.setdefault(int(layer), [0.0] * num_experts)
        row[int(expert)] += _count(count, where, int(layer), int(expert))
    return counts


def _profile(counts: Mapping[int, Sequence[float]], name: str, spec: ModelSpec) -> Profile:
    """Chances: top_k reads a token, shared out by the counts, none above 1."""
    weights = {}
    for layer, row in counts.items():
        shape = spec.layers[layer].experts
        total = sum(row)
        if shape is not None and total > 0:
            weights[layer] = tuple(min(shape.top_k * count / total, 1.0) for count in row)
    if not weights:
        raise RuleError(f"{name}: no count above 0 in it.")
    return Profile(weights)


def _token_rows(data: Any, name: str, spec: ModelSpec) -> list[dict[int, tuple[int, ...]]]:
    if not isinstance(data, list) or not data or not all(isinstance(t, list) for t in data):
        raise RuleError(f"{name}: tokens: expected lists of expert ids per layer, one a token.")
    tokens = []
    for token in data:
        layers = _row_layers(token, f"{name}: tokens", spec)
        rows = zip(layers, token, strict=True)
        tokens.append({layer: tuple(ids) for layer, ids in rows if isinstance(ids, list) and ids})
    return tokens


def _token_lines(data: _Rows, name: str) -> list[dict[int, tuple[int, ...]]]:
    tokens: dict[int, dict[int, list[float]]] = {}
    for token, layer, expert in data.rows:
        tokens.setdefault(int(token), {}).setdefault(int(layer), []).append(expert)
    return [
        {layer: tuple(map(int, ids)) for layer, ids in tokens[token].items()}
        for token in sorted(tokens)
    ]


def _trace(tokens: list[dict[int, tuple[int, ...]]], name: str, spec: ModelSpec) -> Profile:
    counts: dict[int, list[float]] = {}
    for number, token in enumerate(tokens):
        for layer, ids in token.items():
            num_experts = _num_experts(layer, f"{name}: token {number}", spec)
            row = counts.setdefault(layer, [0.0] * num_experts)
            for expert in ids:
                if type(expert) is not int or not 0 <= expert < num_experts:
                    raise RuleError(
                        f"{name}: token {number}, layer {layer}: expected expert ids from 0 to "
                        f"{num_experts - 1}, got {expert!r}."
                    )
                row[expert] += 1
    return Profile(_profile(counts, name, spec).weights, tuple(tokens))
