# SPDX-License-Identifier: Apache-2.0
"""expertyard.from_pretrained(): any checkpoint that Expertyard reads, in one call.

transformers loads what it can load itself. Of a quantised checkpoint it gets a config without a
quantisation and the plain weights of everything but the experts, which go to our packer as they
are; of a GGUF file it gets these under its own names.
"""

import dataclasses
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..dispatch import RunOptions
from ..errors import ConfigError, LoadError
from ..loading import read_quantised
from ..loading.checkpoint import Checkpoint
from ..loading.packed_folder import is_packed
from ..plan import Request
from .config import QUANT_METHOD, ExpertsConfig
from .dense import dense_state
from .gguf_model import open_gguf
from .kept import Kept, choose_kept
from .reading import Reading, reading
from .skeleton import (
    Opened,
    files_of,
    model_class,
    model_dtype,
    open_folder,
    read_config,
    settings_of,
)

__all__ = ["find_model", "from_pretrained", "open_model", "say_what_is_made_plain"]

_OURS = {*(field.name for field in dataclasses.fields(Request)), *RunOptions.names()}


def from_pretrained(
    path: str | Path,
    quantization_config: ExpertsConfig | None = None,
    *,
    gguf_file: str | None = None,
    dtype: Any = None,
    **options: Any,
) -> Any:
    """The model of a folder, of a GGUF file, or of a name on the Hugging Face hub.

    path                 with config.json and safetensors files, quantised or not; a .gguf file; or
                         a folder that `expertyard pack` wrote
    quantization_config  an ExpertsConfig; or give its keywords here: format="int4", rules=...
                         Without `format`, experts keep the checkpoint's own.
    gguf_file            name of a .gguf file in the folder
    dtype                of everything but the experts; default: config.json's
    options              the others go to transformers' from_pretrained
    Raises LoadError, naming file and tensor, before anything is loaded; PlanError, ConfigError and
    so on as ExpertsConfig does.
    """
    given = {name: options.pop(name) for name in list(options) if name in _OURS}
    if quantization_config is not None and given:
        raise ConfigError(
            f"from_pretrained: give {', '.join(given)} to the ExpertsConfig, or no ExpertsConfig."
        )
    ours = quantization_config or ExpertsConfig(**given)
    if not isinstance(ours, ExpertsConfig):
        raise ConfigError(
            f"quantization_config: expected an ExpertsConfig, got {type(ours).__name__}."
        )
    source = find_model(path, gguf_file)
    if source.is_file() or (settings := _foreign(source)) is not None:
        opened = open_gguf(source) if source.is_file() else open_folder(source, settings)
        return _load(opened, ours, model_dtype(opened.config, dtype), options)
    config = read_config(source)
    if settings_of(config) is not None:  # a packed folder: its config carries an ExpertsConfig
        del config.quantization_config
    return model_class(config).from_pretrained(
        source, config=config, quantization_config=ours, dtype=dtype or "auto", **options
    )


def find_model(path: str | Path, gguf_file: str | None = None) -> Path:
    """The folder or GGUF file; downloads what is not here but named like a model of the hub."""
    found = Path(path).expanduser()
    if not found.exists():
        found = _download(str(path), gguf_file)
    if gguf_file is not None:
        found = found / gguf_file
    if found.is_file() and found.suffix != ".gguf":
        raise LoadError(f"{found}: expected a folder or a .gguf file.")
    if not found.exists():
        raise LoadError(f"{found}: no such file.")
    return found


def _download(name: str, gguf_file: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LoadError(f"{name}: no such file or folder.")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.model", "*.txt", "*.jinja", gguf_file or "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise LoadError(f"{name}: no such folder, and it cannot be downloaded: {error}") from None


def _foreign(folder: Path) -> Any:
    """The folder's config if its weights are quantised in a layout that is not ours, else None."""
    config = read_config(folder)
    settings = settings_of(config)
    if settings is not None:
        return None if settings.get("quant_method") == QUANT_METHOD else config
    if is_packed(folder):
        return None
    checkpoint = Checkpoint(files_of(folder))
    return config if read_quantised(checkpoint, None) else None


def open_model(source: Path) -> Opened:
    """A folder of safetensors files or a GGUF file, with the model that it is for."""
    return open_gguf(source) if source.is_file() else open_folder(source)


def _load(opened: Opened, ours: ExpertsConfig, dtype: Any, options: dict[str, Any]) -> Any:
    config, folder = opened.config, opened.folder
    if "generation_config" not in options and (folder / "generation_config.json").is_file():
        options["generation_config"] = GenerationConfig.from_pretrained(folder)
    kept = choose_kept(opened, ours.options.dense == "keep")
    say_what_is_made_plain(opened, kept, dtype)
    read = Reading(opened.checkpoint, opened.sources, folder=opened.spec_folder, kept=kept)
    with reading(read):
        model = model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=dense_state(opened, dtype, kept),
            quantization_config=ours,
            dtype=dtype,
            **options,
        )
    model.config._name_or_path = model.name_or_path = str(folder)
    return model


def say_what_is_made_plain(opened: Opened, kept: Kept, dtype: Any) -> None:
    """A warning, with the reason and the room that it takes, for quantised layers that are no
    experts and do not stay as they are."""
    checkpoint, keys = opened.checkpoint, list(kept.plain)
    if kept.losses:
        warnings.warn(
            f"Not all layers that are no experts are kept as they are: {'; '.join(kept.losses)}. "
            'dense="plain" makes them plain.',
            stacklevel=3,
        )
    if keys:
        weights = sum(math.prod(checkpoint.shape(key)) for key in keys)
        before = sum(checkpoint.nbytes(key) for key in keys)
        why = Counter(kept.plain.values()).most_common()
        reasons = "; ".join(f"{count} because: {reason}" for reason, count in why)
        warnings.warn(
            f"{len(keys)} quantised layers that are no experts ({keys[0]} ...) are made plain in "
            f"{str(dtype).removeprefix('torch.')}: {weights * dtype.itemsize / 2**30:.2f} GiB "
            f"instead of {before / 2**30:.2f} ({reasons}). Experts stay quantised.",
            stacklevel=3,
        )
