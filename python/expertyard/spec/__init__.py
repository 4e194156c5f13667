# SPDX-License-Identifier: Apache-2.0
"""Models as data: ModelSpec from a config.json, from safetensors headers, or from a known name."""

from expertyard.spec.model import ExpertShape, LayerSpec, ModelSpec, Module, Stored
from expertyard.spec.target import resolve_target

__all__ = ["ExpertShape", "LayerSpec", "ModelSpec", "Module", "Stored", "resolve_target"]
