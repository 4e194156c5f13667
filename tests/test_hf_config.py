# SPDX-License-Identifier: Apache-2.0
"""ExpertsConfig takes Request's keywords, and `import expertyard` alone makes both names known."""

import copy
import dataclasses
import inspect
import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.dispatch import RunOptions
from expertyard.errors import ConfigError, DeviceError, KernelError, PlanError, RuleError
from hf_families import FAMILIES, load, save, tiny_model


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_keywords_are_those_of_request():
    shown = list(inspect.signature(ey.ExpertsConfig).parameters)
    known = [*dataclasses.fields(ey.Request), *dataclasses.fields(RunOptions)]
    assert shown == [field.name for field in known]


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'layerz'.* 'layers'"):
        ey.ExpertsConfig(layerz="0:16")


def test_it_survives_dictionaries_json_and_copies():
    config = ey.ExpertsConfig(layers="0:1", memory={"cpu": "2GiB"})
    again = ey.ExpertsConfig.from_dict(config.to_dict())
    assert again.request == config.request == copy.deepcopy(config).request
    assert json.loads(config.to_json_string())["layers"] == "0:1"
    assert repr(config) == "ExpertsConfig(layers='0:1', memory={'cpu': '2GiB'})"


def test_importing_expertyard_imports_neither_torch_nor_transformers():
    code = (
        "import sys, expertyard; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import expertyard, transformers.modeling_utils",
        "import transformers.modeling_utils, expertyard",
        "import transformers, expertyard",
    ],
)
def test_one_import_in_any_order_registers_the_implementation(imports):
    code = (
        f"{imports}\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as plain\n"
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as fp8\n"
        "import sys\n"
        "print('expertyard' in plain, 'expertyard' in fp8, 'expertyard.hf' in sys.modules)"
    )
    assert run(code) == "True True False"


def test_fp8_experts_get_a_sentence():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    with pytest.raises(KernelError, match="Linear holds fp8 weights, and this version"):
        ALL_FP8_EXPERTS_FUNCTIONS["expertyard"](torch.nn.Linear(1, 1), None, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model("qwen3_moe", mlp_only_layers=[]), tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"layers": "7:2"}, DeviceError, "cuda:7, which is not on this machine. Here there is"),
        ({"memory": {"cuda:7": "1GiB"}}, DeviceError, "cuda:7, which is not on this machine"),
        ({"memory": {"cpu": "1MiB"}}, PlanError, "does not fit"),
        ({"mode": "quick"}, ConfigError, "mode: expected one of auto, exact, fast; got 'quick'"),
        ({"search": 3}, ConfigError, "search: expected True or False, got 3"),
        ({"layers": "x"}, RuleError, "expected a whole number, got 'x'"),
        ({"rules": "no-such-file.yaml"}, RuleError, "no-such-file.yaml"),
    ],
)
def test_a_request_that_cannot_be_obeyed_is_a_sentence(folder, keywords, error, words):
    with pytest.raises(error) as caught:
        load(folder, quantization_config=ey.ExpertsConfig(**keywords))
    assert words in str(caught.value)


def test_two_ways_to_place_a_model_are_refused(folder):
    with pytest.raises(ConfigError, match="Leave device_map out"):
        load(folder, quantization_config=ey.ExpertsConfig(), device_map={"": "meta"})


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_harmless_device_maps_are_accepted_and_leave_no_trace(folder, device_map):
    """A "cpu" entry in hf_device_map would keep generate() from compiling."""
    model = load(folder, quantization_config=ey.ExpertsConfig(), device_map=device_map)
    assert not hasattr(model, "hf_device_map")
    ey.verify(model)


def test_a_quantised_checkpoint_is_refused_with_a_sentence(folder, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ConfigError, match=r"\(fp8: see .* expertyard\.from_pretrained"):
        load(folder, config=config, quantization_config=ey.ExpertsConfig())


def test_loaded_models_say_what_they_can_do(folder, tmp_path):
    model = load(folder, quantization_config=ey.ExpertsConfig())
    assert model.hf_quantizer.is_compileable and not model.hf_quantizer.is_trainable
    assert not any("experts" in name for name in model.state_dict())
    assert "expertyard" in model.config.to_json_string()
    with pytest.raises(ConfigError, match="expertyard pack PATH -o OUT"):
        model.save_pretrained(tmp_path)


def test_a_loaded_models_config_loads_again(folder):
    """It carries an ExpertsConfig; alone, or beside the same again, it means the same."""
    first = load(folder, quantization_config=ey.ExpertsConfig(format="bf16"))
    for options in ({}, {"quantization_config": ey.ExpertsConfig(format="bf16")}):
        again = load(folder, config=first.config, **options)
        assert ey.verify(again).layers[0].format == "bf16"


def test_loaded_models_can_be_copied_and_moved(folder):
    model = load(folder, quantization_config=ey.ExpertsConfig())
    packed = model.model.layers[0].mlp.experts.experts.parts[0].packed
    twin = copy.deepcopy(model)
    other = twin.model.layers[0].mlp.experts.experts.parts[0].packed
    assert other is not packed and other.handle != packed.handle
    del model, packed
    ey.verify(twin)
    ids = torch.tensor([[1, 2, 3]])
    expected = load(folder, experts_implementation="eager")(ids).logits
    torch.testing.assert_close(twin.to("cpu")(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_documented_families_are_the_tested_ones():
    assert set(FAMILIES) == {
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
    }


def test_pickling_keeps_road_b_and_is_refused_on_road_a(folder, tmp_path):
    model = load(folder, experts_implementation="expertyard")
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(ids).logits, expected)
    ey.verify(again)
    loaded = load(folder, quantization_config=ey.ExpertsConfig())
    with pytest.raises(KernelError, match="cannot be pickled"):
        torch.save(loaded, tmp_path / "loaded.pt")
