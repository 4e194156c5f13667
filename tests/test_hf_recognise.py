# SPDX-License-Identifier: Apache-2.0
"""What a module computes is found out by trying it; what is not our arithmetic is refused."""

import importlib
import pkgutil

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

import expertyard as ey
from expertyard.errors import KernelError
from expertyard.hf.layers import find_experts, is_experts, layer_number, recognise
from hf_families import FAMILIES, tiny_model

EXPECTED = dict.fromkeys(FAMILIES, "silu") | {"gpt_oss": "swigluoai"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_recognised_even_without_weights(family):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_model(family).config)
    experts = find_experts(model)
    layouts = {recognise(module, name) for name, module in experts.items()}
    (layout,) = layouts
    assert layout.activation == EXPECTED[family]
    assert (layout.hidden_size, layout.intermediate_size) == (72, 40)
    gpt_oss = family == "gpt_oss"
    assert layout.transposed == layout.interleaved == layout.has_bias == gpt_oss


def experts_of(family="mixtral"):
    model = tiny_model(family)
    name, module = next(iter(find_experts(model).items()))
    return model, name, module


def test_the_gate_decides_and_not_the_name():
    _, name, module = experts_of()
    module.act_fn = ACT2FN["gelu_pytorch_tanh"]
    assert recognise(module, name).activation == "gelu_tanh"


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu2", "quick_gelu", "sigmoid"])
def test_an_activation_that_is_not_ours_is_refused(activation):
    _, name, module = experts_of()
    module.act_fn = ACT2FN[activation]
    with pytest.raises(KernelError, match="on random numbers its gate computes none of"):
        recognise(module, name)


@pytest.mark.parametrize("limit", [0.5, 7.0, 10.0])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_limit_is_seen_and_followed(when, limit):
    """deepseek_v4, step3p7 and others. Equal to silu on everyday numbers, so easy to overlook."""
    _, name, module = experts_of()

    def clamped(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=limit) if when == "before" else gate
        gate = module.act_fn(gate).clamp(max=limit) if when == "after" else module.act_fn(gate)
        return gate * up.clamp(-limit, limit)

    module._apply_gate = clamped
    with pytest.raises(KernelError, match="computes none of"):  # the limit is nowhere to be found
        recognise(module, name)
    module.limit = limit
    layout = recognise(module, name)
    assert (layout.activation, layout.limit) == (f"silu_clamp_{when}", limit)


def test_no_limit_is_silu():
    _, name, module = experts_of()
    module.limit = float("inf")
    assert recognise(module, name).activation == "silu"


def test_another_alpha_or_limit_is_followed():
    _, name, module = experts_of("gpt_oss")
    module.alpha, module.limit = 1.25, 5.0
    layout = recognise(module, name)
    assert (layout.activation, layout.alpha, layout.limit) == ("swigluoai", 1.25, 5.0)


def test_swapped_gate_and_up_are_refused():
    _, name, module = experts_of()
    module._apply_gate = lambda gate_up: (
        module.act_fn(gate_up.chunk(2, -1)[1]) * gate_up.chunk(2, -1)[0]
    )
    with pytest.raises(KernelError, match="computes none of"):
        recognise(module, name)


def test_experts_without_a_gate_need_an_up_projection():
    _, name, module = experts_of()
    module.has_gate = False
    with pytest.raises(KernelError, match="expected the parameters up_proj, down_proj, got"):
        recognise(module, name)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_an_activation_that_is_not_ours_is_refused_without_a_gate(activation):
    _, name, module = experts_of()
    module.has_gate, module.act_fn = False, ACT2FN["relu2"]
    module.up_proj = nn.Parameter(module.gate_up_proj[:, :40].detach().clone())
    del module.gate_up_proj
    assert recognise(module, name).activation == "relu2"
    module.act_fn = ACT2FN[activation]
    with pytest.raises(KernelError, match=r"its activation is not max\(x, 0\)\^2"):
        recognise(module, name)


def test_a_parameter_that_nobody_expects_is_refused():
    """A scale, a norm: leaving it out would be silently wrong."""
    _, name, module = experts_of()
    module.scale = nn.Parameter(torch.ones(6))
    with pytest.raises(KernelError, match="expected the parameters gate_up_proj, down_proj, got"):
        recognise(module, name)


def test_experts_outside_the_interface_are_refused_and_named():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(72, 72) for _ in range(6)])
    with pytest.raises(KernelError, match=r"the experts of model\.layers\.1\.mlp\.experts"):
        ey.attach(model)


def test_implementation_refuses_at_the_first_call():
    model, _, module = experts_of()
    model.set_experts_implementation("expertyard")
    module.act_fn = ACT2FN["relu"]
    with pytest.raises(KernelError, match=r"MixtralExperts.*computes none of"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.12.mlp.experts", 12), ("model.language_model.layers.3.experts", 3)],
)
def test_layer_numbers_come_from_names(name, number):
    assert layer_number(name) == number


# --- every family that transformers has ---------------------------------------------------------


def _every_experts_class():
    """(family, class) of every class that transformers' experts interface drives."""
    import transformers.models as models

    for family in sorted(info.name for info in pkgutil.iter_modules(models.__path__)):
        try:
            code = importlib.util.find_spec(f"transformers.models.{family}.modeling_{family}")
        except ModuleNotFoundError:
            continue
        if code is None or code.origin is None:
            continue
        with open(code.origin, encoding="utf-8") as file:
            text = file.read()
        if "@use_experts_implementation" not in text:
            continue
        module = importlib.import_module(code.name)
        for value in vars(module).values():
            ours = isinstance(value, type) and issubclass(value, nn.Module)
            if ours and value.__module__ == code.name and hasattr(value, "_apply_gate"):
                yield family, value


def _small(experts_class, family):
    """An instance with small sizes, from whichever of the family's configurations it takes."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    sizes = {
        **dict.fromkeys(("hidden_size", "moe_hidden_size", "n_embd"), 24),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 20),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
        **dict.fromkeys(("moe_num_experts", "expert_num"), 4),
    }
    for name, config_class in vars(module).items():
        if not name.endswith("Config") or not isinstance(config_class, type):
            continue
        if any(word in name for word in ("Vision", "Encoder", "Sam", "Audio")):
            continue  # towers without experts, with an activation of their own
        try:
            config = config_class()
            # two sizes, for text and for pictures, of which the module is given one
            several = isinstance(getattr(config, "moe_intermediate_size", None), list)
            for key, value in sizes.items():
                if not (several and key == "moe_intermediate_size"):
                    setattr(config, key, value)
            config._experts_implementation = "eager"
            return (
                experts_class(config, sizes["intermediate_size"])
                if several
                else experts_class(config)
            )
        except Exception:
            continue
    return None


def test_every_family_agrees_with_its_eager_code_or_is_refused():
    """No family of this transformers is silently wrong: 60 and more classes."""
    agreed, refused, not_built = [], [], []
    for family, experts_class in _every_experts_class():
        name = f"{family}.{experts_class.__name__}"
        module = _small(experts_class, family)
        if module is None:
            not_built.append(name)
            continue
        assert is_experts(module), name
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                # large, so that clamps and caps would show
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        try:
            layout = recognise(module, "model.layers.0.mlp.experts")
        except KernelError:
            refused.append(name)
            continue
        hidden = torch.randn(9, layout.hidden_size, generator=generator)
        ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator)
        with torch.no_grad():
            expected = module(hidden, ids, weights)
            module.config._experts_implementation = "expertyard"
            got = module(hidden, ids, weights)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3, msg=name)
        agreed.append(name)
    for what, names in (("agree", agreed), ("refused", refused), ("not built here", not_built)):
        print(f"{what} ({len(names)}): {', '.join(names)}")  # seen with pytest -s
    assert len(agreed) >= 30  # transformers 5.7 has 35 such classes, 5.24 has 68
    assert not refused
    assert not not_built  # a class that this test cannot make is one that nobody has compared
