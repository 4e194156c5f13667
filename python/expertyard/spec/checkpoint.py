# SPDX-License-Identifier: Apache-2.0
"""A ModelSpec from a folder: config.json for the shape, headers for the exact bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from expertyard.errors import LoadError, SpecError
from expertyard.spec.config import spec_from_config
from expertyard.spec.headers import TensorInfo, read_folder
from expertyard.spec.model import LayerSpec, ModelSpec, Shape, Stored

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
# experts one by one or fused; Granite's checkpoints have no word for them
_EXPERTS = re.compile(
    r"(?:^|\.)(?:experts\.(?:(\d+)\.)?|block_sparse_moe\.(?=(?:input|output)_linear\b))(.+)$"
)
_VISION = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|multi_modal_projector|mtp)(?:\.|$)")
_FLOATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass
class _Bytes:
    """Sums over the tensors of one part."""

    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    shapes: list[Shape] = field(default_factory=list)

    def add(self, tensor: TensorInfo) -> None:
        self.bytes += tensor.nbytes
        self.shapes.append(tensor.shape)
        self.dtypes[tensor.dtype] = self.dtypes.get(tensor.dtype, 0) + tensor.nbytes

    def format(self) -> str:
        """The format that most bytes are in; '' when the file's dtypes name none of ours."""
        most = max(self.dtypes, key=lambda dtype: self.dtypes[dtype], default="")
        if most in _FLOATS:
            return _FLOATS[most]
        if most == "F8_E4M3":
            return "fp8"
        return {"U8": "mxfp4", "I32": "int4"}.get(most, "")


@dataclass
class _Layer:
    dense: _Bytes = field(default_factory=_Bytes)
    experts: _Bytes = field(default_factory=_Bytes)
    parts: dict[int, set[str]] = field(default_factory=dict)  # expert -> names of its tensors


def spec_from_folder(folder: Path) -> ModelSpec:
    """Spec of a folder. Without safetensors files the bytes are those that config.json implies."""
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"{folder}: no config.json there. Is this the folder of a Hugging Face model?"
        )
    spec = spec_from_config(folder / "config.json", folder.resolve().name)
    tensors = read_folder(folder)
    if not tensors:
        return spec
    layers: dict[int, _Layer] = {}
    outside: dict[str, list[Shape]] = {"embedding": [], "head": [], "norm": [], "vision": []}
    for tensor in tensors.values():
        if _VISION.search(tensor.name):
            outside["vision"].append(tensor.shape)
            continue
        in_layer = _LAYER.search(tensor.name)
        if in_layer is None:
            outside[_outside_part(tensor.name)].append(tensor.shape)
            continue
        layer = layers.setdefault(int(in_layer[1]), _Layer())
        expert = _EXPERTS.search(in_layer[2])
        if expert is None:
            layer.dense.add(tensor)
        elif not expert[2].endswith("bias"):
            layer.experts.add(tensor)
            if expert[1] is not None:
                layer.parts.setdefault(int(expert[1]), set()).add(expert[2])
    _check_layers(folder, spec, layers)
    if spec.tie_word_embeddings:
        outside["head"] = []
    return replace(
        spec,
        layers=tuple(_exact(layer, layers[layer.layer]) for layer in spec.layers),
        embedding=tuple(outside["embedding"]) or spec.embedding,
        head=tuple(outside["head"]),
        norm=tuple(outside["norm"]) or spec.norm,
        vision=tuple(outside["vision"]),
    )


def _outside_part(name: str) -> str:
    if "embed" in name or "wte" in name:
        return "embedding"
    if "head" in name or name.startswith("output"):
        return "head"
    return "norm"


def _check_layers(folder: Path, spec: ModelSpec, found: dict[int, _Layer]) -> None:
    """Every layer of config.json is in the files, with all of its experts."""
    for layer in spec.layers:
        tensors = found.get(layer.layer)
        if tensors is None:
            raise LoadError(
                f"{folder}: no tensor of layer {layer.layer} in the safetensors files, but "
                f"config.json "
                f"says {spec.num_layers} layers. Are files missing?"
            )
        if layer.experts is None:
            continue
        if not tensors.experts.bytes:
            raise LoadError(
                f"{folder}: layer {layer.layer} is a mixture of experts by config.json, but the "
                "safetensors files have no expert of it."
            )
        if tensors.parts:
            _check_experts(folder, layer.layer, layer.experts.num_experts, tensors.parts)


def _check_experts(folder: Path, layer: int, num_experts: int, parts: dict[int, set[str]]) -> None:
    """Every expert is there, with the same tensors as the others."""
    every = set().union(*parts.values())
    for expert in range(num_experts):
        missing = sorted(every - parts.get(expert, set()))
        if missing:
            what = "is" if expert not in parts else f"has no {missing[0]}"
            raise LoadError(
                f"{folder}: layer {layer}: expert {expert} {what} "
                f"{'not ' if expert not in parts else ''}in the safetensors files "
                f"({len(parts)} of {num_experts} experts are). Are files missing?"
            )


def _exact(layer: LayerSpec, found: _Layer) -> LayerSpec:
    """The layer with the files' bytes; unquantised files give the dense shapes too."""
    dense_format, expert_format = found.dense.format(), found.experts.format()
    plain = set(found.dense.dtypes) <= set(_FLOATS)
    return replace(
        layer,
        dense=tuple(found.dense.shapes) if plain else layer.dense,
        stored_dense=Stored(dense_format, found.dense.bytes) if dense_format else None,
        stored_experts=(
            Stored(expert_format, found.experts.bytes)
            if expert_format and layer.experts is not None
            else None
        ),
    )
