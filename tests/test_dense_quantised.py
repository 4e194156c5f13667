# SPDX-License-Identifier: Apache-2.0
"""Layers of a quantised checkpoint that are no experts keep its codes: same numbers, less room."""

import json
import warnings

import pytest

pytest.importorskip("transformers")

import torch
from torch import nn

import checkpoint_writers as writers
import expertyard as ey
from expertyard.errors import ConfigError, KernelError, LoadError, VerifyError
from expertyard.formats import get_format
from expertyard.hf.state import promise_of
from expertyard.linear import PackedLinear
from expertyard.native import _C
from hf_families import greedy, load, logits, prompts
from test_from_pretrained import quantised

LAYOUTS = [name for name in writers.FORMATS if name != "mxfp4"]


def kept_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_its_codes_and_its_numbers(tmp_path, layout):
    folder, truth = quantised(tmp_path, layout, dense=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ey.from_pretrained(folder, dtype=torch.float32, mode="exact")
    kept, reference = kept_layers(model), load(truth)
    (row,) = ey.verify(model).others
    assert (row.format, row.device, row.num_layers) == (writers.FORMATS[layout], "cpu", len(kept))
    assert row.kernel in {kernel["name"] for kernel in _C.kernels() if kernel["runnable"]}
    assert row.nbytes == sum(layer.nbytes for layer in kept.values())
    assert len(kept) == 4 * model.config.num_hidden_layers
    for name, layer in kept.items():
        assert layer.format == writers.FORMATS[layout]
        expected = reference.get_parameter(f"{name}.weight")
        assert torch.equal(layer.dequantize(torch.float64).float(), expected), name
        rows, columns = expected.shape
        # scales as the file has them: float32 where the planner counts on bfloat16
        counted = get_format(layer.format).matrix_bytes(rows, columns)
        assert counted <= layer.nbytes <= 1.1 * counted + 4 * 128 * (columns // 128 + 1)
    batch = prompts()
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model, batch), greedy(reference, batch))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "mixtral"])
def test_other_families(tmp_path, family):
    folder, truth = quantised(tmp_path, "fp8", family, dense=True)
    model = ey.from_pretrained(folder, dtype=torch.float32, mode="exact")
    assert kept_layers(model)
    batch = prompts()
    torch.testing.assert_close(
        logits(model, batch), logits(load(truth), batch), rtol=1e-4, atol=1e-4
    )


def test_transformers_computes_the_same_from_the_same_files(tmp_path):
    """The reference is transformers' own loading, by the library that such files come from."""
    pytest.importorskip("compressed_tensors")
    folder, _ = quantised(tmp_path, "compressed-tensors", dense=True, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    settings["quantization_status"] = "compressed"
    settings["config_groups"]["group_0"]["weights"] |= {"type": "int", "symmetric": True}
    settings["ignore"] = ["lm_head", r"re:.*\.layers\.0\.mlp\..*"]
    (folder / "config.json").write_text(json.dumps(config))
    theirs = load(folder, torch.bfloat16)
    ours = ey.from_pretrained(folder, dtype=torch.bfloat16)
    assert kept_layers(ours)
    batch = prompts()
    difference = logits(ours, batch) - logits(theirs, batch)
    assert difference.abs().median() < 0.02


def test_the_plan_counts_what_is_kept(tmp_path):
    folder, _ = quantised(tmp_path, "compressed-tensors", dense=True, dtype=torch.bfloat16)
    by_choice = {}
    for dense in ("keep", "plain"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ey.from_pretrained(folder, dense=dense)
        by_choice[dense] = promise_of(model).plan, model
    layers = {name: plan.layers[0] for name, (plan, _) in by_choice.items()}
    model = by_choice["keep"][1]
    plain = sum(p.nbytes for p in by_choice["plain"][1].model.layers[0].self_attn.parameters())
    now = sum(p.nbytes for p in model.model.layers[0].self_attn.parameters())
    now += sum(layer.nbytes for name, layer in kept_layers(model).items() if ".layers.0." in name)
    assert layers["plain"].bytes - layers["keep"].bytes == plain - now > 0
    assert layers["keep"].dense_format == "int4-g32" and layers["plain"].dense_format == "bf16"


def test_half_precision_casts_do_not_touch_codes(tmp_path):
    folder, _ = quantised(tmp_path, "fp8", dense=True)
    model = ey.from_pretrained(folder, dtype=torch.float32)
    layer = next(iter(kept_layers(model).values()))
    before = layer.packed.clone()
    nn.Module.to(model, torch.bfloat16)
    assert torch.equal(layer.packed, before)


def test_what_reads_the_weight_is_told(tmp_path):
    folder, _ = quantised(tmp_path, "fp8", dense=True)
    layer = next(iter(kept_layers(ey.from_pretrained(folder)).values()))
    with pytest.raises(AttributeError, match='dense="plain"'):
        layer.weight  # noqa: B018


def test_verify_names_a_layer_that_cannot_run(tmp_path):
    folder, _ = quantised(tmp_path, "awq", dense=True)
    model = ey.from_pretrained(folder, dtype=torch.float32)
    name, layer = next(iter(kept_layers(model).items()))
    assert "8 linear layers that are no experts" in str(ey.verify(model))
    layer.packed = layer.packed[:-64]
    with pytest.raises(VerifyError, match=f"{name}: it cannot run"):
        ey.verify(model)


def test_damaged_scales_are_an_error_that_names_them(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = quantised(tmp_path, "fp8", dense=True)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors:
            if "self_attn.q_proj.weight_scale_inv" in key:
                tensors[key][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"safetensors: tensor '.*q_proj.*NaN or infinite"):
        ey.from_pretrained(folder)


def test_keywords():
    with pytest.raises(ConfigError, match="dense: expected one of keep, plain; got 'kept'"):
        ey.ExpertsConfig(dense="kept")


def test_training_is_refused(tmp_path):
    folder, _ = quantised(tmp_path, "fp8", dense=True)
    model = ey.from_pretrained(folder, dtype=torch.float32)
    layer = next(iter(kept_layers(model).values()))
    x = torch.ones(1, layer.in_features, requires_grad=True)
    with pytest.raises(KernelError, match="no gradient"):
        layer(x).sum().backward()
