# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk, opened with the model that it is for: which tensor is which parameter.

The model is a skeleton on the meta device; nothing is read but headers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import LoadError
from ..loading import Checkpoint, ExpertsLayout, LayerSource, check, read_quantised
from ..spec.headers import INDEX, read_folder
from .layers import find_experts, recognise
from .sources import split_keys

__all__ = ["Opened", "model_class", "model_dtype", "open_folder", "skeleton"]


@dataclass(frozen=True)
class Opened:
    """A checkpoint and its model.

    config   without a quantization_config
    model    the skeleton, of which only classes and shapes are looked at
    method   the quantised layout's name, "" for plain numbers
    sources  of the experts; layouts of their modules
    dense    keys of everything else that the model has -> names that transformers loads
    targets  keys that become a parameter as they are -> its name
    folder   where it lies; spec_folder the same if its headers tell the planner exact bytes
    """

    config: Any
    model: Any
    method: str
    checkpoint: Checkpoint
    sources: tuple[LayerSource, ...]
    layouts: Mapping[str, ExpertsLayout]
    dense: Mapping[str, str]
    folder: Path
    spec_folder: Path | None
    targets: Mapping[str, str] = field(default_factory=dict)


def settings_of(config: Any) -> dict[str, Any] | None:
    """quantization_config of a model's config, as a dictionary."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def read_config(folder: Path, **options: Any) -> Any:
    """LoadError if the folder has no config.json, or one that transformers does not know."""
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder}: not a model's folder: there is no config.json in it.")
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from None


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one; checked against it."""
    if (folder / INDEX).is_file():
        tensors = read_folder(folder)
        return sorted({info.file for info in tensors.values()})
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{folder}: has no *.safetensors files; expected the model's weights.")
    whole = folder / "model.safetensors"
    return [whole] if whole in files else files


def model_class(config: Any) -> Any:
    """transformers' class of the model that config.json names. LoadError if there is none."""
    for name in getattr(config, "architectures", None) or ():
        if (found := getattr(transformers, str(name), None)) is not None:
            return found
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise LoadError(
            f"config.json: transformers {transformers.__version__} has no model class for "
            f"{getattr(config, 'architectures', None)} ({config.model_type})."
        ) from None


def model_dtype(config: Any, asked: Any = None) -> torch.dtype:
    """The dtype that is asked for, else that of config.json, else bfloat16."""
    for found in (asked, getattr(config, "dtype", None)):
        if isinstance(found, str) and found != "auto":
            found = getattr(torch, found, None)
        if isinstance(found, torch.dtype):
            return found
    return torch.bfloat16


def skeleton(config: Any) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return model_class(config)(config)


def open_folder(folder: Path, config: Any = None) -> Opened:
    """A folder of safetensors files, quantised or not. Raises LoadError or KernelError."""
    config = read_config(folder) if config is None else config
    settings = settings_of(config)
    if settings is not None:
        del config.quantization_config
    checkpoint = Checkpoint(files_of(folder))
    method = read_quantised(checkpoint, settings or _old_settings(folder))
    model = skeleton(config)
    layouts = {name: recognise(module, name) for name, module in find_experts(model).items()}
    sources, dense = split_keys(model, checkpoint, layouts)
    for source in sources:
        check(checkpoint, source)
    return Opened(
        config, model, method, checkpoint, tuple(sources), layouts, {key: key for key in dense},
        folder, folder, {key: name for key, name in dense.items() if name},
    )  # fmt: skip


def _old_settings(folder: Path) -> dict[str, Any] | None:
    """quantize_config.json, where GPTQ's and AWQ's first tools put what now is in config.json."""
    path = folder / "quantize_config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise LoadError(f"{path}: is no JSON.") from None
    return found if isinstance(found, dict) else None
