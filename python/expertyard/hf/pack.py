# SPDX-License-Identifier: Apache-2.0
"""Packs a whole checkpoint once, so that it loads without any work ever after.

Layer by layer straight into the mapped files of the result: no layer is ever in memory beside them.
Each finished file is noted with its hash in expertyard.partial.json; packing again goes on behind
the last one that still has its content. expertyard.json, which makes the folder one that loads, is
written at the very end.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..dispatch import RunOptions
from ..errors import ConfigError, LoadError
from ..formats import get_format
from ..loading import DTYPES, LayerSource, assemble, layer_bytes, native_format
from ..loading.convert import common_scales
from ..loading.expert import read_expert
from ..loading.packed_folder import (
    MANIFEST,
    Manifest,
    PackedFile,
    PackedFolder,
    PackedLayer,
    PackedMatrix,
    file_hash,
    is_packed,
    read_manifest,
    write_manifest,
)
from ..loading.progress import Meter, metered
from ..loading.writer import new_file
from ..packing import packed_bytes
from ..spec.headers import INDEX
from .config import PACKED, QUANT_METHOD
from .dense import dense_tensor
from .kept import Kept, choose_kept, packed_matrix, shapes_of
from .load import find_model, open_model, say_what_is_made_plain
from .skeleton import Opened, model_dtype

__all__ = ["pack"]

PARTIAL = "expertyard.partial.json"
_SHARD = 4 << 30  # bytes of plain weights a file
_KEPT_SHARD = 128 << 20  # bytes of quantised ones, which are in memory at once


def pack(
    path: str | Path,
    out: str | Path,
    format: str | None = None,
    *,
    search: bool = False,
    dense: str = "keep",
) -> PackedFolder:
    """Writes `path` to the folder `out` with its experts packed in `format`.

    format  None: the format that the experts of a quantised checkpoint have
    search  look for the scales with the least squared error
    dense   quantised layers that are no experts: "keep" packs their codes, "plain" writes numbers
    Raises LoadError, ConfigError or KernelError. Interrupted, it goes on when called again.
    """
    source, out = find_model(path), Path(out)
    if source.is_dir() and is_packed(source):
        raise ConfigError(f"{source}: is packed already.")
    if out.exists() and (not out.is_dir() or out.resolve() == source.resolve()):
        raise ConfigError(f"{out}: expected a folder, new or begun by an earlier call.")
    opened = open_model(source)
    if twice := [layer.name for layer in opened.sources if layer.same_as]:
        raise LoadError(
            f"{source}: the experts of {twice[0]} are shared by two modules, which packed folders "
            'have no word for. Load it with expertyard.from_pretrained(path, format="...").'
        )
    formats = _formats(opened, format)
    job = {
        "source": _fingerprint(opened),
        "formats": formats,
        "search": search,
        "dense": RunOptions(dense=dense).dense,
        "dtype": str(model_dtype(opened.config)).removeprefix("torch."),
    }
    if is_packed(out):
        packed = PackedFolder(out)
        if packed.rest.get("job") != job:
            raise ConfigError(f"{out}: holds another packed model. Choose an empty folder.")
        return packed
    out.mkdir(parents=True, exist_ok=True)
    begun = _begun(out, job)
    layers, matrices, files = dict(begun.layers), dict(begun.matrices), dict(begun.files)
    done = Manifest(layers, matrices, files, {"job": job})

    def note(path: Path) -> None:
        files[path.name] = PackedFile(path.stat().st_size, file_hash(path))
        write_manifest(out / PARTIAL, done)

    total = sum(layer_bytes(opened.checkpoint, layer) for layer in opened.sources)
    with metered(total, "Packing experts") as meter:
        for number, layer in enumerate(opened.sources):
            name = f"experts-{number:05d}.safetensors"
            if name in files and layer.name in layers:
                meter.advance(layer_bytes(opened.checkpoint, layer))
                continue
            layers[layer.name] = _pack_layer(
                opened, layer, formats[layer.name], search, out / name, meter
            )
            note(out / name)
    kept = choose_kept(opened, dense == "keep")
    say_what_is_made_plain(opened, kept, model_dtype(opened.config))
    for name, modules in _kept_shards(opened, kept):
        if name not in files or not matrices.keys() >= set(modules):
            matrices |= _write_kept(opened, kept, modules, out / name)
            note(out / name)
    weight_map: dict[str, str] = {}
    for name, keys in _shards(opened, kept, model_dtype(opened.config)):
        weight_map |= {opened.dense[key]: name for key in keys}
        if name not in files:
            _write_dense(opened, keys, out / name)
            note(out / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    _copy_small_files(opened, out)
    _write_config(opened, formats, out)
    write_manifest(out / MANIFEST, done)
    (out / PARTIAL).unlink()
    return PackedFolder(out)


def _formats(opened: Opened, format: str | None) -> dict[str, str]:
    """The format of each layer of experts; ConfigError if it is none that can be packed."""
    found: dict[str, str] = {}
    for source in opened.sources:
        name = get_format(format or native_format(opened.checkpoint, source)[0]).name
        if get_format(name).base in DTYPES:
            raise ConfigError(
                f"format: expected int8, int4, fp8 or mxfp4, got {name!r}"
                + ("." if format else f", which {source.name} has: say which format to pack.")
                + " Plain weights in safetensors files are used in place already."
            )
        found[source.name] = name
    return found


def _fingerprint(opened: Opened) -> str:
    """Changes when the source does: names, sizes and times of its files."""
    facts = []
    for file in opened.checkpoint.files:
        stat = file.stat()
        facts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    config = opened.config.to_json_string()
    return hashlib.sha256("\n".join([*sorted(facts), config]).encode()).hexdigest()


def _begun(out: Path, job: Mapping[str, Any]) -> Manifest:
    """What an earlier call has finished and the disk still has, byte for byte."""
    if not (out / PARTIAL).is_file():
        if any(out.iterdir()):
            raise ConfigError(f"{out}: is not empty. Choose a new or an empty folder.")
        return Manifest({}, {}, {}, {})
    begun = read_manifest(out / PARTIAL)
    if begun.rest.get("job") != json.loads(json.dumps(job)):
        raise ConfigError(
            f"{out}: holds a half-packed model, of another source or in another format. Empty the "
            "folder, or choose another."
        )
    whole = {
        name: file
        for name, file in begun.files.items()
        if (out / name).is_file()
        and (out / name).stat().st_size == file.bytes
        and file_hash(out / name) == file.sha256
    }
    layers = {name: layer for name, layer in begun.layers.items() if layer.file in whole}
    matrices = {name: matrix for name, matrix in begun.matrices.items() if matrix.file in whole}
    return Manifest(layers, matrices, whole, begun.rest)


def _pack_layer(
    opened: Opened, source: LayerSource, format: str, search: bool, path: Path, meter: Meter
) -> PackedLayer:
    layout, target = source.layout, get_format(format)
    first = read_expert(opened.checkpoint, source, 0)
    scales = common_scales(first.matrices, target)
    sizes = packed_bytes(
        format, layout.hidden_size, layout.intermediate_size, scales, layout.activation
    )
    each = sum(sizes)
    experts, inner, outer = layout.num_experts, layout.intermediate_size, layout.hidden_size
    tensors: dict[str, Any] = {f"{source.name}.blobs": (torch.uint8, (experts, each))}
    if layout.has_bias:
        for bias, size in (("gate_bias", inner), ("up_bias", inner), ("down_bias", outer)):
            tensors[f"{source.name}.{bias}"] = (torch.float32, (experts, size))
    with new_file(path, tensors) as parts:
        packed = assemble(
            opened.checkpoint,
            source,
            format=format,
            device="cpu",
            search=search,
            arena=parts[f"{source.name}.blobs"].view(-1),
            advance=meter.advance,
        )
        if layout.has_bias:
            for number in range(experts):
                expert = read_expert(opened.checkpoint, source, number)
                for bias in ("gate_bias", "up_bias", "down_bias"):
                    parts[f"{source.name}.{bias}"][number].copy_(getattr(expert, bias))
        return PackedLayer.of(path.name, packed, layout.has_bias)


def _kept_shards(opened: Opened, kept: Kept) -> Iterator[tuple[str, list[str]]]:
    """Files of layers that stay quantised: name and modules."""
    sizes = {
        name: get_format(format).matrix_bytes(rows, columns)
        for name, format, rows, columns in shapes_of(kept, opened.checkpoint)
    }
    for number, names in enumerate(_runs(sizes, _KEPT_SHARD)):
        yield f"kept-{number:05d}.safetensors", names


def _write_kept(
    opened: Opened, kept: Kept, names: list[str], path: Path
) -> dict[str, PackedMatrix]:
    """All in memory at once, because the types of their scales say how many bytes they take."""
    made = {name: packed_matrix(opened.checkpoint, kept.layers[name]) for name in names}
    matrices = {}
    for name, (_, format, scale_type) in made.items():
        rows, columns = opened.checkpoint.shape(kept.layers[name])
        matrices[name] = PackedMatrix(path.name, format.name, scale_type, rows, columns)
    with new_file(
        path, {f"{name}.packed": (torch.uint8, blob.shape) for name, (blob, _, _) in made.items()}
    ) as parts:
        for name, (blob, _, _) in made.items():
            parts[f"{name}.packed"].copy_(blob)
    return matrices


def _shards(opened: Opened, kept: Kept, dtype: torch.dtype) -> Iterator[tuple[str, list[str]]]:
    """Files of plain weights: name and keys."""
    stay = set(kept.layers.values())
    sizes = {
        key: torch.Size(opened.checkpoint.shape(key)).numel() * dtype.itemsize
        for key in opened.dense
        if key not in stay
    }
    shards = list(_runs(sizes, _SHARD))
    for number, keys in enumerate(shards):
        yield f"dense-{number + 1:05d}-of-{len(shards):05d}.safetensors", keys


def _runs(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in their order, cut where the next one would make it more than `most` bytes."""
    run: list[str] = []
    total = 0
    for name, size in sizes.items():
        if run and total + size > most:
            yield run
            run, total = [], 0
        run.append(name)
        total += size
    if run:
        yield run


def _write_dense(opened: Opened, keys: list[str], path: Path) -> None:
    dtype = model_dtype(opened.config)
    meta = {}
    for key in keys:
        tensor = None if opened.checkpoint.stored(key) else opened.checkpoint.tensor(key)
        own = dtype if tensor is None else tensor.dtype
        meta[opened.dense[key]] = (own, tuple(opened.checkpoint.shape(key)))
    with new_file(path, meta) as parts:
        for key in keys:
            target = parts[opened.dense[key]]
            target.copy_(dense_tensor(opened, key, dtype).reshape(target.shape))


def _copy_small_files(opened: Opened, out: Path) -> None:
    """Tokenizer, chat template, generation settings: whatever lies beside the weights."""
    for file in sorted(opened.folder.iterdir()):
        small = file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken")
        if small and not file.name.endswith(".index.json") and file.name not in ("config.json",):
            shutil.copyfile(file, out / file.name)


def _write_config(opened: Opened, formats: Mapping[str, str], out: Path) -> None:
    config = json.loads(opened.config.to_json_string(use_diff=True))
    config["quantization_config"] = {"quant_method": QUANT_METHOD, PACKED: True}
    config.setdefault("architectures", opened.config.architectures)
    if not opened.config.architectures:
        raise LoadError("config.json: names no architectures; a packed model needs them.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
