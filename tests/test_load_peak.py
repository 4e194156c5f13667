# SPDX-License-Identifier: Apache-2.0
"""Quantising while loading never has a second copy of the experts: measured in a new process.

Peak of anonymous memory over what there was before: at most the packed size, one expert in float32
and 200 MB. A bfloat16 copy of the model would be far above.
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import save_file

from hf_families import tiny_config

HIDDEN, INTER, EXPERTS, LAYERS = 1024, 512, 40, 4
EXPERT_FP32 = 3 * HIDDEN * INTER * 4
BF16 = EXPERT_FP32 // 2 * EXPERTS * LAYERS
ALLOWED = 200 << 20

MEASURE = """
import json, sys, threading, time
import torch, transformers, expertyard as ey
from expertyard import hf, packing

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

folder, format, road = sys.argv[1:]
torch.zeros(1) @ torch.zeros(1)
before, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
if road == "pack":
    from expertyard.hf.pack import pack
    packed = 0
    pack(folder, folder + "-packed", format)
else:
    model = ey.from_pretrained(folder, format=format)
    packed = sum(row.nbytes for row in ey.verify(model).layers)
running = False
watcher.join()
print(json.dumps({"peak": peak - before, "packed": packed}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    config = tiny_config(
        "qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=INTER, num_experts=EXPERTS,
        num_hidden_layers=LAYERS, mlp_only_layers=[], head_dim=64, dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(path)
    from expertyard.hf.skeleton import skeleton

    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(HIDDEN * INTER, generator=generator) * 0.02).bfloat16()
    tensors = {}
    for name, parameter in skeleton(config).state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            stem = f"model.layers.{layer}.mlp.experts.{expert}"
            for part, shape in (("gate", (INTER, HIDDEN)), ("up", (INTER, HIDDEN)),
                                ("down", (HIDDEN, INTER))):  # fmt: skip
                tensors[f"{stem}.{part}_proj.weight"] = noise.view(shape).clone()
        save_file(tensors, path / f"part-{layer}.safetensors", metadata={"format": "pt"})
        index = path / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        weight_map |= dict.fromkeys(tensors, f"part-{layer}.safetensors")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        tensors = {}
    return path


def measure(folder, format, road="load"):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), format, road],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_takes_the_packed_size_and_little_more(folder):
    found = measure(folder, "int4")
    limit = found["packed"] + EXPERT_FP32 + ALLOWED
    assert found["peak"] <= limit, f"{found} against {limit}"
    assert found["packed"] * 3.5 < BF16
    assert limit < BF16 * 0.75  # else the test could not tell a bf16 copy


def test_packing_to_a_folder_takes_next_to_nothing(folder):
    assert measure(folder, "int4", "pack")["peak"] <= EXPERT_FP32 + ALLOWED
