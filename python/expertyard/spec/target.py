# SPDX-License-Identifier: Apache-2.0
"""The TARGET of the command line: a folder, a config.json, or the name of a known model."""

from pathlib import Path

from expertyard.errors import SpecError
from expertyard.spec.model import ModelSpec


def resolve_target(target: str | Path) -> ModelSpec:
    """ModelSpec of what `target` names. Raises SpecError when it is neither a path nor a known
    name.
    """
    path = Path(target)
    try:
        if path.is_dir():
            return ModelSpec.from_folder(path)
        if path.is_file():
            return ModelSpec.from_config(path)
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError) or not isinstance(error, OSError):
            raise
        raise SpecError(f"{path}: cannot be read ({error.strerror}).") from None
    if path.suffix == ".json" or str(target).startswith(("/", "./", "../", "~")):
        raise SpecError(f"{path}: no such file or folder.")
    return ModelSpec.from_family(str(target))
