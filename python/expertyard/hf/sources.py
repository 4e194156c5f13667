# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint keeps each experts module's weights, told by transformers' own tables.

transformers' conversion mapping says how a family's checkpoint keys become parameters. Two of its
recipes need no work at all and are read in place: a tensor that is the parameter, and one tensor an
expert (MergeModulelist, then Concatenate of gate and up). Every other recipe that keeps experts
apart is applied to one expert at a time.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..errors import LoadError
from ..loading import Checkpoint, ExpertsLayout, LayerSource, PerExpert, Rows, Whole
from ..loading.layer import Flat, Source

__all__ = ["find_sources", "split_keys"]

# checkpoint keys of one parameter: source pattern of the converter (None: plain renaming) -> keys
_Keys = dict[str | None, list[str]]


def find_sources(
    model: Any, checkpoint: Checkpoint, layouts: Mapping[str, ExpertsLayout]
) -> list[LayerSource]:
    """The sources of every module in `layouts`.

    model    the skeleton that still has its experts parameters, meta device or not
    layouts  experts module -> its layout
    Raises LoadError, naming file or tensor, if experts are missing or come in an unknown way.
    """
    return split_keys(model, checkpoint, layouts)[0]


def split_keys(
    model: Any, checkpoint: Checkpoint, layouts: Mapping[str, ExpertsLayout]
) -> tuple[list[LayerSource], dict[str, str]]:
    """The sources of every module in `layouts`, and the keys of all other parameters and buffers,
    each with the name of the one that it becomes, "" if it only becomes a part of one.

    Keys that the model has no place for, such as those of layers for multi-token prediction, are
    in neither.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = {
        f"{name}.{parameter}"
        for name, layout in layouts.items()
        for parameter in layout.parameter_shapes()
    }
    found: dict[str, _Keys] = defaultdict(lambda: defaultdict(list))
    dense: dict[str, str] = {}
    state_dict = model.state_dict()
    for key in sorted(checkpoint.keys, key=dot_natural_key):
        target, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state_dict
        )
        if target not in state_dict and key in state_dict:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, state_dict)
        if target in expected:
            found[target][pattern].append(key)
        elif target in state_dict:
            dense[key] = target if pattern is None else ""

    same_as = _shared(model, layouts, found)

    def source(name: str, layout: ExpertsLayout, parameter: str) -> Source:
        owner = same_as.get(name, name)
        targets = [f"{owner}.{theirs}" for theirs in layout.names_of(parameter)]
        parts = [
            _source(model, checkpoint, target, layout, parameter, found.get(target, {}), by_pattern)
            for target in targets
        ]
        if not layout.flat:
            return parts[0]
        keys = [part.key for part in parts if isinstance(part, Whole)]
        if len(keys) < len(parts):
            raise LoadError(f"{targets[0]!r}: expected one tensor of the checkpoint for it.")
        return Flat(tuple(keys))

    layers = [
        LayerSource(
            name,
            layout,
            {own: source(name, layout, own) for own in layout.parameters},
            same_as.get(name, ""),
        )
        for name, layout in layouts.items()
    ]
    return layers, dense


def _shared(
    model: Any, layouts: Mapping[str, ExpertsLayout], found: Mapping[str, _Keys]
) -> dict[str, str]:
    """Experts module -> the other one whose experts it has, by transformers' tied weights.

    The files have them under one name, whichever. LoadError if they have both, as transformers then
    ties them only if all numbers are equal.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    same: dict[str, str] = {}
    for name, layout in layouts.items():
        for parameter in layout.parameter_shapes():
            target = f"{name}.{parameter}"
            if target not in tied:
                continue
            source, other = tied[target], tied[target].removesuffix(f".{parameter}")
            if other not in layouts:
                raise LoadError(f"{target!r} is tied to {source!r}, which no experts module has.")
            if found.get(target) and found.get(source):
                raise LoadError(
                    f"{target!r} is {source!r} under another name, and the checkpoint has both. "
                    "Load the model without ExpertsConfig and call expertyard.attach(model) "
                    "instead."
                )
            alias, owner = (other, name) if found.get(target) else (name, other)
            same[alias] = owner
    return same


def _source(
    model: nn.Module,
    checkpoint: Checkpoint,
    target: str,
    layout: ExpertsLayout,
    parameter: str,
    keys: _Keys,
    by_pattern: Mapping[str, WeightConverter],
) -> Source:
    if not keys:
        raise LoadError(
            f"No tensor of the checkpoint becomes {target!r}: the experts of this layer are "
            "missing. Download the missing files, or check that config.json belongs to them."
        )
    if set(keys) == {None}:
        return Whole(_only(target, keys[None]))
    pattern = next(pattern for pattern in keys if pattern is not None)
    converter = by_pattern[pattern]
    recipe = [
        (type(operation).__name__, getattr(operation, "dim", None))
        for operation in converter.operations
    ]
    parts = len(converter.source_patterns)
    stacked = {1: [("MergeModulelist", 0)], 2: [("MergeModulelist", 0), ("Concatenate", 1)]}
    if recipe == stacked.get(parts):
        columns = [
            _per_expert(checkpoint, target, layout, keys.get(source), source)
            for source in converter.source_patterns
        ]
        return PerExpert(tuple(columns))
    merges = bool(recipe) and recipe[0] == ("MergeModulelist", 0)
    return _rows(model, checkpoint, target, layout, parameter, keys, converter, merges)


def _only(target: str, keys: list[str]) -> str:
    if len(keys) > 1:
        raise LoadError(f"Several tensors of the checkpoint become {target!r}: {', '.join(keys)}.")
    return keys[0]


def _per_expert(
    checkpoint: Checkpoint,
    target: str,
    layout: ExpertsLayout,
    keys: list[str] | None,
    pattern: str,
) -> tuple[str, ...]:
    """One key an expert, in the order of experts; LoadError names the first one missing."""
    if not keys:
        raise LoadError(f"No tensor of the checkpoint matches {pattern!r}, a part of {target!r}.")
    num_experts = layout.num_experts
    by_number = {_expert_number(key): key for key in keys}
    missing = [number for number in range(num_experts) if number not in by_number]
    if missing:
        like = re.sub(r"(.*\.)\d+(\.)", rf"\g<1>{missing[0]}\g<2>", keys[0])
        raise LoadError(
            f"{like!r} is missing: the checkpoint has {len(by_number)} of {num_experts} experts "
            f"for {target!r}, the first of them in {checkpoint.file(keys[0])}."
        )
    most = num_experts + layout.spare
    if len(by_number) > most or len(keys) > most:
        raise LoadError(
            f"{target!r} has {num_experts} experts, but the checkpoint has {len(keys)} tensors "
            f"for them, the last one {keys[-1]!r}. The file does not belong to this config.json."
        )
    return tuple(by_number[number] for number in range(num_experts))


def _expert_number(key: str) -> int:
    """The last whole number among a key's dotted words: layers.3.mlp.experts.17.up_proj -> 17."""
    numbers = [word for word in key.split(".") if word.isdigit()]
    return int(numbers[-1]) if numbers else -1


# NVFP4 or MXFP8 to plain numbers; what is plain passes
_DECODER = "Inkling2LoopDequantizeExperts"


def _keeps_experts_apart(operation: Any) -> bool:
    """Whether an operation on [E, ...] does the same to [1, ...], one expert at a time."""
    along = [getattr(operation, name, None) for name in ("dim", "dim0", "dim1")]
    known = {"Concatenate", "Transpose", "Interleave", _DECODER}
    return type(operation).__name__ in known and 0 not in along


@dataclass(frozen=True)
class _OneExpert:
    """The model as a conversion of one expert sees it: some transpose only what has not yet the
    parameter's shape. The real one has no parameters any more when experts are read."""

    config: Any
    shape: tuple[int, ...]

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shape, device="meta")


def _rows(
    model: nn.Module,
    checkpoint: Checkpoint,
    target: str,
    layout: ExpertsLayout,
    parameter: str,
    keys: _Keys,
    converter: WeightConverter,
    merges: bool,
) -> Rows:
    rest = converter.operations[1:] if merges else converter.operations
    if not all(map(_keeps_experts_apart, rest)) or len(converter.target_patterns) != 1:
        steps = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise LoadError(
            f"{target!r}: this family's checkpoints are converted by {steps}, which Expertyard "
            "does not do expert by expert. Load the model without ExpertsConfig and call "
            "expertyard.attach(model) instead."
        )
    columns: dict[str, tuple[str, ...]] = {}
    for pattern in converter.source_patterns:
        if merges:
            columns[pattern] = _per_expert(checkpoint, target, layout, keys.get(pattern), pattern)
        elif keys.get(pattern):
            columns[pattern] = (_only(target, keys[pattern]),)

    shape = layout.shape(parameter)
    one = _OneExpert(model.config, (1, *shape[1:]))

    def row(expert: int) -> torch.Tensor:
        collected: Any = {}
        for pattern, sources in columns.items():
            if merges:
                collected[pattern] = [checkpoint.tensor(sources[expert])]
            else:
                stacked = checkpoint.tensor(sources[0])
                each = stacked.shape[:1] == (layout.num_experts,)  # or one scale for all of them
                collected[pattern] = [stacked[expert : expert + 1] if each else stacked]
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=target,
                model=one,
                config=model.config,
            )
        (result,) = collected.values()
        merged: torch.Tensor = result[0] if isinstance(result, list) else result
        return merged[0]

    keys_read = tuple(key for sources in columns.values() for key in sources)
    return Rows(keys_read, row, any(type(step).__name__ == _DECODER for step in rest))
