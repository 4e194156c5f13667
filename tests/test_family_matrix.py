# SPDX-License-Identifier: Apache-2.0
"""Every family of transformers' experts interface: logits of a checkpoint that we load agree with
those of transformers' own loading, or the family is refused with a sentence.

Minutes long, so it runs with `-m slow`; test_hf_roads runs some of them with every change.
"""

import importlib
import inspect
from functools import partial

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

import expertyard as ey
from expertyard.errors import KernelError, LoadError
from expertyard.hf.layers import find_experts, recognise
from expertyard.hf.pack import pack
from hf_families import logits

pytestmark = pytest.mark.slow

# what a config shrinks to, where it has such an attribute
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 97, "moe_intermediate_size": 40, "intermediate_size": 40,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "max_position_embeddings": 64, "n_shared_experts": 1, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "mlp_only_layers": [],
}  # fmt: skip
SMALL_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_hidden_layers": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
LANGUAGE = ("text_config", "thinker_config", "ffn_config", "attn_config")
AUTOS = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForTokenClassification)
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
GEMMA = {
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40, "global_head_dim": 16,
    "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
INKLING2 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "unpadded_vocab_size": 97, "mlp_gate_softcap": 0.3, "mlp_up_softcap": 0.2,
}  # fmt: skip
LOOP = {
    **INKLING2, "num_hidden_layers": 3, "loop_layer_index_start": 1, "loop_layer_index_end": 2,
    "loop_gate_rank": 8, "n_layers_per_attn_res_block": 1,
}  # fmt: skip
# small enough for half of the gates and ups to be cut off
LIMIT = {"swiglu_limit": 0.05}
GLM5 = {**SPARSE, **LIMIT, "qk_rope_head_dim": 0, "index_head_dim": 16, "index_n_heads": 2,
        "linear_head_dim": 16, "linear_num_heads": 4, "num_key_value_heads": 4}  # fmt: skip
HY4 = {
    **LIMIT, **SPARSE, "index_head_dim": 16, "index_n_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
OWN = {
    "bailing_hybrid": {"num_expert_group": 1},
    "deepseek_v4": LIMIT,
    "hy_v4": LIMIT,
    "hy_v4_vl": {"text_config": HY4},
    "glm5_next": {"text_config": GLM5},
    "beam": SPARSE,
    "deepseek_ocr2": {"text_config": SPARSE},
    "unlimited_ocr": {"text_config": SPARSE},
    "mistral_large4": {"text_config": SPARSE},
    "step3p7": {
        "text_config": {
            **SPARSE, "swiglu_limits": [0.0, 0.05],
            "layer_types": ["full_attention", "full_attention"], "sliding_window": 16,
        }
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            **SPARSE, "moe_intermediate_size": [40, 24], "moe_num_experts": 4, "moe_k": 2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2],
            },
        }
    },
    "gemma4_text": {**GEMMA, "enable_moe_block": True},
    "gemma4": {"text_config": {**GEMMA, "enable_moe_block": True}},
    "diffusion_gemma": {"text_config": GEMMA},
    "inkling2_text": INKLING2,
    "inkling2_loop_text": LOOP,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 40, "moe_top_k": 2},
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"], "moe_latent_size": 48,
        "moe_shared_expert_intermediate_size": 32,
    },
    "muse_spark": {
        "text_config": {"moe_hidden_size": 48},
        "audio_config": {
            "patch_sizes": [16], "hidden_sizes": [32], "depths": [1], "num_hidden_layers": 1,
            "out_hidden_size": 64,
        },
    },
    "inkling2_loop": {"text_config": LOOP, "vision_config": {"text_hidden_size": 64}},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 90,  # read by its forward, in every checkpoint's config.json
        "audio_config": {
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "downsample_hidden_size": 16, "output_dim": 64,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "qwen3_vl_moe": {"text_config": {}, "vision_config": {}},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 1.0,
            }
        },
        "vision_config": {},
    },
    "qwen3_5_moe": {"text_config": {}, "vision_config": {}},
    "aria": {"text_config": {}, "vision_config": {}},
    "llama4": {"text_config": {"intermediate_size_mlp": 48}, "vision_config": {}},
    "llama4_text": {"intermediate_size_mlp": 48, "num_experts_per_tok": 2},
    "longcat_flash": {
        "expert_ffn_hidden_size": 40, "ffn_hidden_size": 48, "zero_expert_num": 2, "num_layers": 1,
        "moe_topk": 3,
    },
}  # fmt: skip
COMPUTED = (
    "afmoe", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "kolibri1", "laguna",
    "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "solar_open", "aria_text", "gpt_oss",
    "llama4_text", "longcat_flash", "lfm2_moe", "dots3_note_text", "inkling_text",
    "minimax_m3_vl_text", "qwen4_exp_text", "qwen3_5_moe", "aria", "llama4", "qwen3_vl_moe",
    "glm4v_moe", "deepseek_v4", "hy_v4", "hy_v4_vl", "inkling2_text", "nemotron_h", "jetmoe",
    "dbrx",
    "beam", "deepseek_ocr2", "gemma4_text", "gemma4", "mistral4", "mistral_large4", "lara_mini",
    "openai_privacy_filter", "unlimited_ocr", "zaya", "diffusion_gemma", "glm5_next",
    "inkling2_loop", "inkling2_loop_text", "muse_spark", "qwen3_omni_moe_thinker", "step3p7",
)  # fmt: skip
REFUSED = ("doge",)
# By road A: from_pretrained with an ExpertsConfig. Their experts can be attached.
REFUSED_CHECKPOINTS = ("ernie4_5_vl_moe",)
# Experts in a module for each, in encoders and decoders or backbones that are no language models.
NO_LANGUAGE_MODELS = ("nllb_moe", "switch_transformers", "vitpose_backbone")


def tiny(family):
    try:
        base = AutoConfig.for_model(family)
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    config = AutoConfig.for_model(family, **small(base, SMALL, OWN.get(family, {})))
    if family == "dbrx":
        router = importlib.import_module("transformers.models.dbrx.modeling_dbrx").DbrxRouter
        if router(config.ffn_config).hidden_size != config.d_model:
            pytest.skip("this transformers (5.7) gives DBRX's router its experts' width: none runs")
    return config


def small(base, sizes, own):
    """Sizes of a config, and of the configs in it: what has experts or none as SMALL says, what
    looks or listens as SMALL_VISION does."""
    parts = {
        name: small(part, SMALL if name in LANGUAGE else SMALL_VISION, own.get(name, {}))
        for name, part in vars(base).items()
        if isinstance(part, PretrainedConfig)
    }
    return {**shrunk(base, sizes), **own, **parts}


def shrunk(base, small):
    """What of the small sizes the config has, in one number for all layers."""
    own = base.to_dict()
    sizes = {key: value for key, value in small.items() if key in own}
    if "qk_rope_head_dim" in own:  # latent attention: one rotary part for all heads
        sizes |= {"head_dim": 8, "num_key_value_heads": 4}
    return sizes


def model_of(config, **options):
    """A language model, alone or behind a vision tower."""
    for auto in AUTOS:
        if type(config) in auto._model_mapping:
            return auto.from_config(config, **options)
    raise AssertionError(f"transformers has no model for {type(config).__name__}")


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                continue
            # large enough for experts to matter, small enough for odd layers (A_log, dt) to live
            tensor.copy_((noise * (0.5 * max(tensor.shape[-1:] or [1]) ** -0.5)).bfloat16())
    return model.eval()


def batch(family=""):
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    if family == "diffusion_gemma":  # its decoder sees the prompt through a cache
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": ids.flip(1),
        }  # fmt: skip
    # no cache: two layers of a hybrid may have no attention among them
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@pytest.mark.parametrize("family", COMPUTED)
def test_logits_agree_with_transformers_own_loading(family, tmp_path):
    model = randomise(model_of(tiny(family), dtype=torch.float32))
    model.save_pretrained(tmp_path)
    load = partial(type(model).from_pretrained, tmp_path, dtype=torch.float32)
    theirs = load(experts_implementation="eager").eval()
    ours = load(quantization_config=ey.ExpertsConfig()).eval()
    assert ey.verify(ours).layers
    expected = logits(theirs, batch(family))
    assert expected.isfinite().all()
    torch.testing.assert_close(logits(ours, batch(family)), expected, rtol=1e-4, atol=1e-4)
    packed = ey.from_pretrained(tmp_path, dtype=torch.float32, format="int8")
    error = (logits(packed, batch(family)) - expected).square().mean().sqrt() / expected.std()
    assert error < 0.15
    # Else all of this would pass with experts that compute nothing.
    downs = {
        module.get_parameter(parameter)  # once, if two modules share it
        for name, module in find_experts(theirs).items()
        for parameter in recognise(module, name).names_of("down_proj")
    }
    for parameter in downs:
        parameter.data.neg_()
    assert (logits(theirs, batch(family)) - expected).abs().max() > 0.01


def test_experts_that_two_modules_share_are_read_once(tmp_path):
    """diffusion_gemma's encoder and decoder; the file has them under one name, whichever."""
    model = randomise(model_of(tiny("diffusion_gemma"), dtype=torch.float32))
    model.save_pretrained(tmp_path)
    load = partial(type(model).from_pretrained, tmp_path, dtype=torch.float32)
    expected = logits(load(experts_implementation="eager").eval(), batch("diffusion_gemma"))
    with pytest.raises(LoadError, match="shared by two modules"):
        pack(tmp_path, tmp_path / "packed", format="int8")
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    theirs, other = "model.decoder.layers.", "model.encoder.language_model.layers."
    experts = {key: tensors[key] for key in tensors if "experts." in key}
    assert experts and all(key.startswith(theirs) for key in experts)
    renamed = {key.replace(theirs, other): tensor for key, tensor in experts.items()}
    rest = {key: tensors[key] for key in tensors if key not in experts}
    for named in (experts, renamed):
        save_file({**rest, **named}, file, metadata={"format": "pt"})
        ours = load(quantization_config=ey.ExpertsConfig()).eval()
        parts = [
            [ours.get_submodule(f"{where}{layer}.experts").experts for where in (theirs, other)]
            for layer in range(2)
        ]
        assert all(one is same for one, same in parts)
        assert parts[0][0] is not parts[1][0]
        got = logits(ours, batch("diffusion_gemma"))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        ours.tie_weights()  # what is left to tie
        torch.testing.assert_close(logits(ours, batch("diffusion_gemma")), got)
    apart = {key: tensor.clone() for key, tensor in renamed.items()}
    save_file({**rest, **experts, **apart}, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="the checkpoint has both"):
        load(quantization_config=ey.ExpertsConfig())


def test_inkling2_loops_nvfp4_and_mxfp8_experts_are_read_as_transformers_reads_them(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(SMALL, "moe_intermediate_size", 64)  # MXFP8 has groups of 32
    model = randomise(model_of(tiny("inkling2_loop_text"), dtype=torch.float32))
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    weights = [key for key in tensors if key.endswith((".w13_weight", ".w2_weight"))]
    assert len(weights) == 6
    for key in weights:
        experts, rows, columns = tensors[key].shape
        if key.endswith("w13_weight"):
            codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator)
            tensors[key] = codes.to(torch.uint8)
            scales = torch.rand(experts, rows, columns // 16, generator=generator) + 0.5
            tensors[f"{key}_scale"] = scales.to(torch.float8_e4m3fn)
            tensors[f"{key}_amax"] = torch.rand(experts, generator=generator) + 0.5
            tensors[f"{key}_outer_scale_denominator"] = torch.tensor([10.0])  # one for all
        else:
            numbers = torch.randn(experts, rows, columns, generator=generator)
            tensors[key] = numbers.to(torch.float8_e4m3fn)
            scales = torch.randint(122, 126, (experts, rows, columns // 32), generator=generator)
            tensors[f"{key}_scale"] = scales.to(torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    load = partial(type(model).from_pretrained, tmp_path, dtype=torch.float32)
    expected = logits(load(experts_implementation="eager").eval(), batch())
    assert (expected - logits(model, batch())).abs().max() > 0.1
    ours = load(quantization_config=ey.ExpertsConfig()).eval()
    torch.testing.assert_close(logits(ours, batch()), expected, rtol=1e-4, atol=1e-4)


# families whose shared experts are understood (hf/shared.py), by name of their class
SHARED = sorted({
    "afmoe", "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe",
    "exaone_moe", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "hy_v3", "kimi_linear", "laguna",
    "llama4_text", "minimax_m3_vl_text", "mistral4", "nemotron_h", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_next", "solar_open", "step3p7",
} & {*COMPUTED})  # fmt: skip


@pytest.mark.parametrize("family", SHARED)
def test_shared_experts_beside_the_cpus_give_the_same_bits(family, tmp_path, monkeypatch):
    model = randomise(model_of(tiny(family), dtype=torch.float32))
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("EXPERTYARD_VIRTUAL_GPUS", "1")
    placed = ey.ExpertsConfig(layers=f"0:{model.config.get_text_config().num_hidden_layers}",
                              gpu_experts=1)  # fmt: skip
    found, overlapped = [], []
    for on in "01":
        monkeypatch.setenv("EXPERTYARD_SHARED_OVERLAP", on)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32,
                                             quantization_config=placed).eval()  # fmt: skip
        logits(loaded, batch())  # the first call shows what comes out
        shared = [m.meanwhile.__self__ for m in loaded.modules() if getattr(m, "meanwhile", None)]
        for one in shared:
            one._compute = partial(_seen, one._compute, one, overlapped)
        found.append(logits(loaded, batch()))
        assert bool(shared) == (on == "1") and not any(one.off for one in shared)
    assert torch.equal(*found)
    assert len(overlapped) == len(shared) and all(overlapped)


def _seen(compute, shared, overlapped, *arguments):
    """Notes whether the experts' call runs them, not the block's own."""
    frame = inspect.currentframe().f_back
    overlapped.append(frame.f_code.co_name in ("_fill", "_ahead"))
    return compute(*arguments)


@pytest.mark.parametrize("family", REFUSED_CHECKPOINTS)
def test_checkpoints_that_cannot_be_read_are_refused_with_a_sentence(family, tmp_path):
    model = randomise(model_of(tiny(family), dtype=torch.float32))
    model.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"attach\(model\) instead\."):
        type(model).from_pretrained(tmp_path, quantization_config=ey.ExpertsConfig())
    expected = logits(model, batch())
    assert ey.verify(ey.attach(model)).layers
    torch.testing.assert_close(logits(model, batch()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_other_arithmetic_is_refused_with_a_sentence(family, tmp_path):
    config = tiny(family)
    with torch.device("meta"):
        model = model_of(config)
    with pytest.raises(KernelError) as caught:
        for name, module in find_experts(model).items():
            recognise(module, name)
    assert str(caught.value).endswith(".")
