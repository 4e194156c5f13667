# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the package: a small, really trained mixture of experts.

Torch-free: it only says where the folder is. docs/tiny_model.md says what is in it.
"""

from pathlib import Path

from expertyard.errors import LoadError

__all__ = ["tiny_moe"]


def tiny_moe() -> Path:
    """Folder of the embedded Qwen3-MoE model (bf16, byte-level), ready for from_pretrained.

    Raises LoadError if the installation left the weights out.
    """
    folder = Path(__file__).parent / "tiny_moe"
    if not (folder / "model.safetensors").is_file():
        raise LoadError(
            f"{folder}: the embedded model's model.safetensors is missing. Install the package "
            "again, or train the model anew with examples/tiny_moe/train.py"
        )
    return folder
