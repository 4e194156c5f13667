# SPDX-License-Identifier: Apache-2.0
"""How fast one core turns each source layout into packed experts, in file bytes a second.

    python bench/read_sources.py

Matrices of 2048 x 2048 that are in the page cache, read, decoded and packed as `pack` does it; the
best of several rounds, in processor time of this process, so that others do not count.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import checkpoint_writers as writers
from expertyard.formats import get_format
from expertyard.linear import PackedLinear
from expertyard.loading import Checkpoint, GgufCheckpoint, read_quantised
from expertyard.loading.convert import in_format
from expertyard.quantize import QuantizedMatrix, quantize

SIZE, ROUNDS = 2048, 5


def safetensors_source(folder: Path, layout: str) -> Checkpoint:
    weight = torch.randn(SIZE, SIZE) * 0.02
    file = folder / f"{layout}.safetensors"
    if layout == "bf16":
        save_file({"w.weight": weight.bfloat16()}, file)
        return Checkpoint([file])
    if layout == "mxfp4":
        tensors = {f"w.weight{k}": v for k, v in writers.gpt_oss(weight[None])[0].items()}
    elif layout == "gptq, act-order":
        tensors = writers.gptq(weight, order=torch.randperm(SIZE))[0]
    else:
        tensors = writers.LAYOUTS[layout](weight)[0]
    joined = {k if k.startswith("w.") else f"w.{k}": v.contiguous() for k, v in tensors.items()}
    save_file(joined, file)
    checkpoint = Checkpoint([file])
    settings = dict(writers.QUANT_CONFIGS[layout.partition(",")[0]])
    if "act-order" in layout:
        settings["desc_act"] = True
    read_quantised(checkpoint, settings)
    return checkpoint


def gguf_source(folder: Path, kind: str) -> Checkpoint:
    from gguf import GGMLQuantizationType, GGUFWriter

    from gguf_writers import encode

    raw, _ = encode(np.random.default_rng(0).normal(size=(1, SIZE, SIZE)) * 0.02, kind)
    writer = GGUFWriter(folder / f"{kind}.gguf", "test")
    writer.add_tensor("w.weight", raw[0], raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint([folder / f"{kind}.gguf"])


def rate(checkpoint: Checkpoint, wanted: str | None) -> tuple[float, float, str]:
    """File bytes and weights a second, and the format."""
    stored = checkpoint.stored("w.weight")
    format = wanted or (stored.format if stored else "int4")
    expert = 0 if len(checkpoint.shape("w.weight")) == 3 else None
    layer, best = PackedLinear(SIZE, SIZE, None), float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time()
        matrix = checkpoint.matrix("w.weight", expert)
        if not isinstance(matrix, QuantizedMatrix):
            matrix = quantize(matrix, get_format(format))
        layer.put(in_format(matrix, get_format(format)))
        best = min(best, time.process_time() - begin)
    return checkpoint.nbytes("w.weight") / best, SIZE * SIZE / best, format


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| source | to | MiB of the file a second | million weights a second |\n|--|--|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = ["bf16", "fp8", "fp8-channel", "mxfp4", "compressed-tensors", "int8", "gptq",
                   "gptq, act-order", "awq"]  # fmt: skip
        made = [(layout, safetensors_source(folder, layout)) for layout in sources]
        kinds = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
        made += [(f"GGUF {kind}", gguf_source(folder, kind)) for kind in kinds]
        for title, checkpoint in made:
            octets, weights, format = rate(checkpoint, None)
            print(
                f"| {title} | {format} | {octets / 2**20:.0f} | {weights / 1e6:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
