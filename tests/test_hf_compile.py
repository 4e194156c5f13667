# SPDX-License-Identifier: Apache-2.0
"""torch.compile takes the whole model in one graph on every road, and sees weights that change."""

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.errors import KernelError
from hf_families import greedy, load, logits, prompts, save, tiny_model
from test_hf_roads import ROADS, on_road

FAMILIES = ["qwen3_moe", "gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save(tiny_model(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


class Graphs:
    """A compiler backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("road", ROADS)
def test_one_graph_and_the_same_logits(folder, road):
    """Compiled before the first eager call: nothing has been packed or laid out yet on road B."""
    batch = prompts()
    expected = logits(load(folder, experts_implementation="eager"), batch)
    graphs = Graphs()
    model = torch.compile(on_road(road, folder, torch.float32), fullgraph=True, backend=graphs)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert graphs.count == 1
    ey.verify(model)


@pytest.mark.parametrize("road", ROADS)
def test_compiling_with_gradients_enabled_works_and_backward_is_a_sentence(folder, road):
    """A compiler traces backward together with forward; only running it may fail."""
    model = on_road(road, folder, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**prompts()).logits.sum()
    with pytest.raises((KernelError, RuntimeError), match="has no gradient"):
        loss.backward()


def test_a_graph_sees_parameters_that_move(folder):
    """New memory for the same parameters: a handle from compile time would be stale."""
    model = load(folder, experts_implementation="expertyard")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = logits(compiled, prompts())
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            experts.down_proj.data = torch.zeros_like(experts.down_proj.data)
    got = logits(compiled, prompts())
    model.set_experts_implementation("eager")
    torch.compiler.reset()
    torch.testing.assert_close(got, logits(model, prompts()), rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_static_cache_generation_compiled_by_inductor(folder, road):
    from transformers import CompileConfig

    batch = prompts()
    expected = greedy(load(folder, experts_implementation="eager"), batch)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    model = on_road(road, folder, torch.float32)
    got = greedy(model, batch, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("road", ROADS)
def test_static_cache_generation_compiled(folder, road):
    from transformers import CompileConfig

    batch = prompts()
    expected = greedy(load(folder, experts_implementation="eager"), batch)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    model = on_road(road, folder, torch.float32)
    torch._dynamo.utils.counters.clear()
    got = greedy(model, batch, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
