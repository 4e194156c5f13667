# SPDX-License-Identifier: Apache-2.0
"""No second copy of the experts: packed experts point into the file, or into the parameters."""

import gc
import weakref

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.hf import binding
from hf_families import FAMILIES, load, logits, prompts, save, tiny_model


def _packed(module):
    bound = binding.binding_of(module)
    return (module.experts if bound is None else bound.experts()).parts[0].packed


def pointers(packed):
    return [t.data_ptr() for matrices in packed._matrices for t in matrices]


def file_ranges(folder):
    """Addresses at which the files of a folder are mapped."""
    with open("/proc/self/maps") as maps:
        lines = [line.split()[0] for line in maps if str(folder) in line]
    return [tuple(int(address, 16) for address in line.split("-")) for line in lines]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loaded_experts_are_the_mapped_file(family, dtype, tmp_path):
    model = load(
        save(tiny_model(family, dtype), tmp_path), dtype, quantization_config=ey.ExpertsConfig()
    )
    ranges = file_ranges(tmp_path)
    for row in ey.verify(model).layers:
        for pointer in pointers(model.get_submodule(row.name).experts.parts[0].packed):
            assert any(low <= pointer < high for low, high in ranges)


@pytest.mark.parametrize("road", ["implementation", "attach"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_other_roads_are_the_parameters(family, road):
    model = tiny_model(family, torch.bfloat16)
    if road == "attach":
        ey.attach(model)
    else:
        model.set_experts_implementation("expertyard")
    for row in ey.verify(model).layers:
        module = model.get_submodule(row.name)
        packed = binding.binding_of(module).experts().parts[0].packed
        gate, up, down = packed._matrices
        storages = [
            (p.untyped_storage().data_ptr(), p.untyped_storage().nbytes())
            for p in (module.gate_up_proj, module.down_proj)
        ]
        # the parameter's storage holds the weights and nothing else
        assert storages[0][1] == sum(t.numel() * t.element_size() for t in (*gate, *up))
        assert storages[1][1] == sum(t.numel() * t.element_size() for t in down)
        for (start, size), group in zip(storages, ((*gate, *up), down), strict=True):
            assert all(start <= t.data_ptr() < start + size for t in group)


@pytest.mark.parametrize("road", ["load", "implementation", "attach"])
def test_a_model_that_is_deleted_frees_its_experts(road, tmp_path):
    folder = save(tiny_model("gpt_oss"), tmp_path)
    if road == "load":
        model = load(folder, quantization_config=ey.ExpertsConfig())
    else:
        model = load(folder, experts_implementation="expertyard" if road != "attach" else "eager")
    if road == "attach":
        ey.attach(model)
    logits(model, prompts())
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    packed = _packed(experts)
    gone = weakref.ref(packed)
    del model, experts, packed
    gc.collect()
    assert gone() is None
