# SPDX-License-Identifier: Apache-2.0
"""Experts come from files unchanged: in place where they can be, else converted one by one."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from expertyard.errors import LoadError
from expertyard.loading import (
    Checkpoint,
    ExpertsLayout,
    LayerSource,
    PerExpert,
    Rows,
    Whole,
    assemble,
    check,
)
from expertyard.ops import moe_experts
from expertyard.reference import moe_experts_reference

E, H, INTER = 5, 24, 20  # neither size a multiple of anything that a kernel likes


def random_experts(dtype, has_bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_up_proj": (E, 2 * INTER, H), "down_proj": (E, H, INTER)}
    if has_bias:
        shapes |= {"gate_up_proj_bias": (E, 2 * INTER), "down_proj_bias": (E, H)}
    return {
        name: torch.randn(shape, generator=generator).bfloat16().to(dtype)
        for name, shape in shapes.items()
    }


def write(folder, tensors):
    """In two files, as checkpoints come."""
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name].contiguous().clone() for name in part},
            folder / f"{number}.safetensors",
        )
    return Checkpoint([folder / "0.safetensors", folder / "1.safetensors"])


def run(packed, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(9, H, generator=generator)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator)
    return (hidden, ids, weights), moe_experts(hidden, ids, weights, packed)


def assert_computes(packed, experts, layout):
    """experts as [E, 2I, H] and [E, H, I], whatever the layout in the file was."""
    inputs, got = run(packed)
    expected = moe_experts_reference(
        *inputs,
        experts["gate_up_proj"],
        experts["down_proj"],
        gate_up_bias=experts.get("gate_up_proj_bias"),
        down_bias=experts.get("down_proj_bias"),
        activation=layout.activation,
        interleaved=layout.interleaved,
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def whole(layout):
    return LayerSource("m", layout, {name: Whole(name) for name in layout.parameter_shapes()})


def apart(layout, tensors):
    """The same experts, one tensor an expert and projection."""
    gate, up = tensors["gate_up_proj"].chunk(2, dim=1)
    out, parameters = {}, {}
    for name, parts in (("gate_up_proj", (gate, up)), ("down_proj", (tensors["down_proj"],))):
        keys = tuple(tuple(f"{name}.{p}.{e}" for e in range(E)) for p in range(len(parts)))
        parameters[name] = PerExpert(keys)
        for part, row in zip(parts, keys, strict=True):
            out |= dict(zip(row, part, strict=True))
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        if layout.has_bias:
            out[name] = tensors[name]
            parameters[name] = Whole(name)
    return LayerSource("m", layout, parameters), out


@pytest.mark.parametrize(
    ("transposed", "interleaved", "has_bias", "file_dtype", "format"),
    itertools.product(
        [False, True],
        [False, True],
        [False, True],
        [torch.float32, torch.bfloat16],
        ["fp32", "bf16"],
    ),
)
def test_every_layout_in_every_format(
    tmp_path, transposed, interleaved, has_bias, file_dtype, format
):
    layout = ExpertsLayout(
        E, H, INTER, "swigluoai", transposed=transposed, interleaved=interleaved, has_bias=has_bias
    )
    experts = random_experts(file_dtype, has_bias)
    stored = dict(experts)
    if transposed:
        for name in ("gate_up_proj", "down_proj"):
            stored[name] = experts[name].transpose(1, 2)
    packed = assemble(write(tmp_path, stored), whole(layout), format=format, device="cpu")
    assert packed.format == format
    assert_computes(packed, experts, layout)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_experts_in_tensors_of_their_own(tmp_path, has_bias, format):
    layout = ExpertsLayout(E, H, INTER, "silu", has_bias=has_bias)
    experts = random_experts(torch.bfloat16, has_bias)
    source, stored = apart(layout, experts)
    packed = assemble(write(tmp_path, stored), source, format=format, device="cpu")
    assert_computes(packed, experts, layout)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_parameter_whole_and_the_other_apart(tmp_path, interleaved):
    layout = ExpertsLayout(E, H, INTER, "silu", interleaved=interleaved, has_bias=True)
    experts = random_experts(torch.bfloat16, True)
    source, stored = apart(layout, experts)
    source.parameters["gate_up_proj"] = Whole("gate_up_proj")
    stored["gate_up_proj"] = experts["gate_up_proj"]
    packed = assemble(write(tmp_path, stored), source, format="bf16", device="cpu")
    assert_computes(packed, experts, layout)


def test_rows_are_converted_one_expert_at_a_time(tmp_path):
    layout = ExpertsLayout(E, H, INTER, "silu")
    experts = random_experts(torch.bfloat16, False)
    checkpoint = write(
        tmp_path,
        {"gate_up_proj": experts["gate_up_proj"] * 2, "down_proj": experts["down_proj"]},
    )
    asked = []

    def row(expert):
        asked.append(expert)
        return checkpoint.tensor("gate_up_proj")[expert] / 2

    source = whole(layout)
    source.parameters["gate_up_proj"] = Rows(("gate_up_proj",), row)
    packed = assemble(checkpoint, source, format="bf16", device="cpu")
    assert sorted(set(asked)) == list(range(E))
    assert_computes(packed, experts, layout)


def test_rows_of_a_wrong_shape_are_refused(tmp_path):
    """A shape that would broadcast is the dangerous one."""
    layout = ExpertsLayout(E, H, INTER, "silu")
    checkpoint = write(tmp_path, random_experts(torch.bfloat16, False))
    source = whole(layout)
    source.parameters["down_proj"] = Rows(("down_proj",), lambda expert: torch.zeros(1, INTER))
    with pytest.raises(LoadError, match=r"m: expected down_proj \[24, 20\] for expert \d"):
        assemble(checkpoint, source, format="bf16", device="cpu")


def file_ranges(folder):
    """Addresses at which the files of a folder are mapped."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            if str(folder) in line:
                yield [int(address, 16) for address in line.split()[0].split("-")]


@pytest.mark.parametrize("stacked", [True, False])
def test_matching_weights_stay_in_the_mapped_file(tmp_path, stacked):
    layout = ExpertsLayout(E, H, INTER, "silu")
    experts = random_experts(torch.bfloat16, False)
    source, stored = (whole(layout), experts) if stacked else apart(layout, experts)
    packed = assemble(write(tmp_path, stored), source, format="bf16", device="cpu")
    ranges = list(file_ranges(tmp_path))
    pointers = [t.data_ptr() for matrices in packed._matrices for t in matrices]
    assert len(pointers) == 3 * E
    assert all(any(low <= p < high for low, high in ranges) for p in pointers)
    assert_computes(packed, experts, layout)


def test_the_mapping_outlives_the_checkpoint(tmp_path):
    layout = ExpertsLayout(E, H, INTER, "silu")
    experts = random_experts(torch.bfloat16, False)
    packed = assemble(write(tmp_path, experts), whole(layout), format="bf16", device="cpu")
    for file in tmp_path.iterdir():
        file.unlink()
    assert_computes(packed, experts, layout)


def test_a_wrong_shape_names_file_and_tensor(tmp_path):
    checkpoint = write(tmp_path, random_experts(torch.bfloat16, False))
    source = whole(ExpertsLayout(E, H, INTER + 2, "silu"))
    with pytest.raises(LoadError, match=r"1\.safetensors: tensor 'gate_up_proj': expected shape"):
        check(checkpoint, source)
