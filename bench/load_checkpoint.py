# SPDX-License-Identifier: Apache-2.0
"""Loading a large synthetic checkpoint: time and memory beside transformers, in one run.

    python bench/load_checkpoint.py [--gib 8] [--folder DIR] [--format int4]

Each way loads in a process of its own, in turn with its files in the page cache ("warm": all read
before) and with none of them there ("cold": dropped, and the kernel asked whether they are).
Every model then computes one token, so that a load that puts work off is seen; its logits are
compared. `expertyard pack` runs once, before them, and writes its result and the hashes to the
disk. Peaks are of anonymous memory, over what the process had after its imports; mapped files are
not in them, since they can be dropped and are shared.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, INTER, EXPERTS = 2048, 768, 64
LAYER_BYTES = 3 * HIDDEN * INTER * EXPERTS * 2

CHILD = """
import json, sys, threading, time
import torch, transformers, expertyard as ey
from expertyard import hf
transformers.logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

way, folder, format, out = sys.argv[1:]
torch.ones(8, 8) @ torch.ones(8, 8)
before, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
begin = time.perf_counter()
if way == "pack":
    from expertyard.hf.pack import pack
    pack(folder, out, format)
elif way == "transformers":
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
elif format == "bf16":
    model = ey.from_pretrained(folder)
else:
    model = ey.from_pretrained(folder, **({} if way == "packed" else {"format": format}))
loaded = time.perf_counter()
logits = torch.zeros(0)
if way != "pack":
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits[0, -1].float()
first = time.perf_counter()
running = False
watcher.join()
print(json.dumps({"load_s": loaded - begin, "first_token_s": first - loaded,
                  "peak": peak - before, "after": anonymous() - before,
                  "logits": logits[:64].tolist()}))
"""


def write(folder: Path, layers: int) -> None:
    """A Qwen3-MoE of random bf16 weights; one file a layer. Experts share their noise."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    from expertyard.hf.skeleton import skeleton

    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=HIDDEN, moe_intermediate_size=INTER, num_experts=EXPERTS,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(HIDDEN * INTER, generator=generator) * 0.02).bfloat16()
    weight_map: dict[str, str] = {}
    state = skeleton(config).state_dict()
    for layer in range(layers):
        tensors = {
            name: torch.ones(value.shape, dtype=torch.bfloat16)
            if "norm" in name
            else (torch.randn(value.shape, generator=generator) * 0.02).bfloat16()
            for name, value in state.items()
            if ".experts." not in name
            and (f".layers.{layer}." in name or (layer == 0 and ".layers." not in name))
        }
        for expert in range(EXPERTS):
            for part, shape in (("gate", (INTER, HIDDEN)), ("up", (INTER, HIDDEN)),
                                ("down", (HIDDEN, INTER))):  # fmt: skip
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                tensors[name] = noise.roll(7 * expert).view(shape)
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resident(file: Path) -> float:
    """The share of a file that is in the page cache."""
    size = file.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), size) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found)
    return sum(page & 1 for page in found) / pages


def prepare(folder: Path, warm: bool) -> float:
    """Fills or empties the page cache of the weights; their share that then is in it."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb", buffering=0) as opened:
            if not warm:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and opened.read(16 << 20):
                pass
    sizes = [file.stat().st_size for file in files]
    shares = map(resident, files)
    return sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)


def measure(way: str, folder: Path, format: str, out: Path | None = None) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, way, str(folder), format, str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way}, {format}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=8, help="of the checkpoint (default: 8)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument(
        "--write-only", action="store_true", help="write the checkpoint to --folder and stop"
    )
    parser.add_argument("--format", default="int4", help="to quantise to (default: int4)")
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gib * 2**30 / LAYER_BYTES))
    if arguments.write_only:
        write(arguments.folder / "plain", layers)
        return
    given = arguments.folder is not None and (arguments.folder / "plain").is_dir()
    base = arguments.folder if given else Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        compare(base, layers, arguments.format)
    finally:
        shutil.rmtree(base)


def compare(base: Path, layers: int, format: str) -> None:
    plain, packed = base / "plain", base / "packed"
    if not plain.is_dir():
        write(plain, layers)
    os.sync()  # else packing would wait for the disk to write this
    size = layers * LAYER_BYTES / 2**30
    print(f"checkpoint: {layers} layers of {EXPERTS} experts, {size:.2f} GiB of experts in bf16")
    found = measure("pack", plain, format, packed)
    speed = size / found["load_s"]
    print(
        f"expertyard pack --format {format}: {found['load_s']:.2f} s, {speed:.2f} GiB/s, peak "
        f"{found['peak'] / 2**30:.2f} GiB",
        flush=True,
    )
    ways = [
        ("transformers, bf16", "transformers", plain, "bf16"),
        ("expertyard, bf16 in place", "expertyard", plain, "bf16"),
        (f"expertyard, {format} while loading", "expertyard", plain, format),
        (f"expertyard, {format} packed before", "packed", packed, format),
    ]
    os.sync()  # what is not on the disk yet cannot be dropped from memory
    print(
        "| | files in memory | load, s | first forward, s | peak, GiB | afterwards, GiB | "
        "logits off by |"
    )
    print("|--|--:|--:|--:|--:|--:|--:|")
    reference: list[float] = []
    for (name, way, folder, wanted), warm in itertools.product(ways, (True, False)):
        there = prepare(folder, warm)
        found = measure(way, folder, wanted)
        logits: list[float] = found["logits"]  # type: ignore[assignment]
        reference = reference or logits
        off = max(abs(a - b) for a, b in zip(logits, reference, strict=True))
        scale = max(map(abs, reference))
        print(
            f"| {name} | {100 * there:.0f} % | {found['load_s']:.2f} | "
            f"{found['first_token_s']:.2f} | "
            f"{found['peak'] / 2**30:.2f} | {found['after'] / 2**30:.2f} | "
            f"{100 * off / scale:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
