# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a whole model: experts by our own reader, the rest by transformers' tables.

config: config.json beside the file if there is one, else what transformers makes of the metadata.
Names: those of the `gguf` package and transformers. Some architectures keep dense tensors in
another order than transformers (llama.cpp permutes llama's q and k); transformers' own processors
undo that. Experts are in no other order in any of them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..errors import LoadError
from ..loading import ExpertsLayout, GgufCheckpoint, LayerSource, Stacked, check, gguf_files
from ..loading.layer import Source
from .layers import find_experts, layer_number, recognise
from .skeleton import Opened, read_config, skeleton

__all__ = ["open_gguf"]

_EXPERTS = re.compile(r"^blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)$")
# general.architecture -> transformers' model_type, where they differ by more than a dash
_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2"}


@dataclass(frozen=True)
class _Tables:
    """What transformers knows about GGUF."""

    weights_map: Any
    processors: Any


def open_gguf(path: Path) -> Opened:
    """LoadError for files that are damaged, and for models that transformers does not know."""
    checkpoint = GgufCheckpoint(gguf_files(path))
    tables = _tables()
    architecture = str(checkpoint.header.metadata.get("general.architecture", ""))
    config = _config(path, checkpoint, architecture)
    model = skeleton(config)
    layouts = {name: recognise(module, name) for name, module in find_experts(model).items()}
    sources = tuple(_source(checkpoint, name, layout) for name, layout in layouts.items())
    for source in sources:
        check(checkpoint, source)
    processor = tables.processors.get(architecture) or tables.processors.get(config.model_type)
    processor = processor(config=config.to_dict()) if processor is not None else None
    dense = _dense(checkpoint, model, tables, processor, path)
    return Opened(
        config,
        model,
        "gguf",
        _Processed(checkpoint, processor),
        sources,
        layouts,
        dense,
        path.parent,
        None,
        {key: name for key, name in dense.items() if _in_order(checkpoint, processor, key)},
    )


def _tables() -> _Tables:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LoadError(
            "Reading a GGUF file as a model needs the gguf package, for the names of its tensors: "
            "pip install 'expertyard[gguf]'"
        ) from None
    from transformers import modeling_gguf_pytorch_utils as theirs

    return _Tables(theirs.get_gguf_hf_weights_map, theirs.TENSOR_PROCESSORS)


def _config(path: Path, checkpoint: GgufCheckpoint, architecture: str) -> Any:
    if (path.parent / "config.json").is_file():
        config = read_config(path.parent)
    else:
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            raise LoadError(
                f"{path}: transformers makes no model of its metadata (architecture "
                f"{architecture!r}: {error}). Put the config.json of the original model beside it."
            ) from None
        # transformers' table leaves out the experts' size and takes a default: the tensors know
        experts = [checkpoint.shape(key) for key in checkpoint.keys if "ffn_gate_exps.w" in key]
        if experts and hasattr(config, "moe_intermediate_size"):
            config.moe_intermediate_size = experts[0][-2]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _source(checkpoint: GgufCheckpoint, name: str, layout: ExpertsLayout) -> LayerSource:
    block = f"blk.{layer_number(name)}"
    parameters: dict[str, Source] = {}
    for kind in ("weight", "bias") if layout.has_bias else ("weight",):
        suffix = "" if kind == "weight" else "_bias"
        halves = ("gate", "up") if layout.has_gate else ("up",)
        keys = [f"{block}.ffn_{part}_exps.{kind}" for part in halves]
        joined = f"{block}.ffn_gate_up_exps.{kind}"
        if checkpoint.has(joined):
            raise LoadError(
                f"{checkpoint.where(joined)}: gate and up are one tensor, which is not "
                "read. Convert the model with separate ffn_gate_exps and ffn_up_exps."
            )
        parameters[f"gate_up_proj{suffix}"] = Stacked(tuple(keys))
        parameters[f"down_proj{suffix}"] = Stacked((f"{block}.ffn_down_exps.{kind}",))
    for where in parameters.values():
        assert isinstance(where, Stacked)
        for key in where.keys:
            if not checkpoint.has(key):
                raise LoadError(
                    f"{checkpoint.files[0]}: tensor {key!r} is missing, but by its config the "
                    f"model has experts there ({name}). The file does not belong to this model."
                )
    return LayerSource(name, layout, parameters)


def _dense(
    checkpoint: GgufCheckpoint, model: Any, tables: _Tables, processor: Any, path: Path
) -> dict[str, str]:
    """GGUF name -> transformers' name, of everything but the experts."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

    try:
        names = tables.weights_map(model, processor or TensorProcessor())
    except (NotImplementedError, ValueError, KeyError) as error:
        raise LoadError(f"{path}: transformers has no names for its tensors: {error}") from None
    dense = {key: names[key] for key in checkpoint.keys if key in names and not _EXPERTS.match(key)}
    state = model.state_dict()
    have = set(dense.values())
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [
        name for name in state if name not in have and ".experts." not in name and name not in tied
    ]
    if missing:
        raise LoadError(
            f"{path}: no tensor of the file becomes {missing[0]!r} "
            f"({len(missing)} of the model's are missing). transformers does not know this "
            "architecture's names well enough, or the file does not belong to this config.json."
        )
    return dense


def _in_order(checkpoint: GgufCheckpoint, processor: Any, key: str) -> bool:
    """Whether a tensor's rows are in transformers' order already, tried with their numbers."""
    shape = checkpoint.shape(key)
    if processor is None or len(shape) != 2:
        return processor is None
    numbers = torch.arange(shape[0], dtype=torch.float32)[:, None].numpy()
    try:
        done = processor.process(numbers.copy(), name=key).weights
    except Exception:  # it wants more than one column: it does something with them
        return False
    return done.shape == numbers.shape and bool((done == numbers).all())


class _Processed(GgufCheckpoint):
    """The same checkpoint; tensor() gives dense tensors in transformers' order of rows."""

    def __init__(self, checkpoint: GgufCheckpoint, processor: Any) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._processor = processor

    def tensor(self, key: str) -> Tensor:
        tensor = super().tensor(key)
        if self._processor is None or _EXPERTS.match(key):
            return tensor
        plain = tensor.float().numpy()
        done = self._processor.process(plain, name=key).weights
        if done is plain:
            return tensor
        return torch.from_numpy(done).to(tensor.dtype)
