# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: which tensors make one weight, and how it is read. One file a layout.

A layout is a function claim(checkpoint, settings) -> {weight: Stored}. It looks at names, dtypes
and shapes only, so a checkpoint is judged whole before a weight is read; its read functions give
one [out, in] matrix in the native format that holds it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import LoadError
from ..checkpoint import Checkpoint, Stored
from . import awq, compressed_tensors, fp8_blocks, gptq, mxfp4

__all__ = ["LAYOUTS", "read_quantised"]

Claim = Callable[[Checkpoint, Mapping[str, Any]], dict[str, Stored]]

# quant_method in config.json -> the layout
LAYOUTS: dict[str, Claim] = {
    "fp8": fp8_blocks.claim,
    "mxfp4": mxfp4.claim,
    "compressed-tensors": compressed_tensors.claim,
    "gptq": gptq.claim,
    "awq": awq.claim,
}
# tensors that only make sense while activations are quantised too
_UNUSED = (".input_scale", ".activation_scale", ".qscale_act", ".k_scale", ".v_scale")


def read_quantised(checkpoint: Checkpoint, settings: Mapping[str, Any] | None) -> str:
    """Shows quantised weights under their own names; returns the layout's name, "" for none.

    settings  quantization_config of config.json; without it, the tensors' names and dtypes tell
    Raises LoadError, naming file and tensor, for a layout that is not known or makes no sense.
    """
    method = _method(checkpoint, settings)
    if not method:
        return ""
    if method not in LAYOUTS:
        raise LoadError(
            f"config.json: quantization_config: quant_method {method!r} is not read by Expertyard, "
            f"only {', '.join(LAYOUTS)}, and GGUF. Load the unquantised version of this model."
        )
    stored = LAYOUTS[method](checkpoint, settings or {})
    if not stored:
        raise LoadError(
            f"config.json says that the checkpoint is quantised ({method}), but no tensor in "
            f"{checkpoint.files[0].parent} is. The files do not belong to this config.json."
        )
    unused = [key for key in checkpoint.keys if key.endswith(_UNUSED)]
    checkpoint.replace(stored, unused)
    return method


def _method(checkpoint: Checkpoint, settings: Mapping[str, Any] | None) -> str:
    if settings is not None and "quant_method" in settings:
        method = settings["quant_method"]
        return str(getattr(method, "value", method))
    kinds = {checkpoint.kind(key) for key in checkpoint.keys}
    names = {key.rpartition(".")[2] for key in checkpoint.keys}
    if "F8_E4M3" in kinds:
        return "fp8"
    if "weight_packed" in names:
        return "compressed-tensors"
    if any(name.endswith("_proj_blocks") for name in names):
        return "mxfp4"
    if "qweight" in names:
        return "gptq" if gptq.looks_like(checkpoint) else "awq"
    return ""
