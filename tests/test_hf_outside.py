# SPDX-License-Identifier: Apache-2.0
"""Families whose experts have no gate, or are kept or called in ways of their own: on every road
that they have, they compute what transformers computes; on the others, that is said."""

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.errors import KernelError, VerifyError
from hf_families import greedy, load, logits, save
from test_family_matrix import model_of, randomise, tiny
from test_hf_roads import on_road

# family -> its roads, and the class of its experts
FAMILIES = {
    "nemotron_h": (("load", "implementation", "attach"), "NemotronHExperts"),  # no gate
    "llama4_text": (("load", "attach"), "Llama4TextExperts"),  # weights what goes in
    "longcat_flash": (("load", "attach"), "LongcatFlashExperts"),  # some experts give what they get
    "jetmoe": (("load", "attach"), "JetMoeMoE"),  # the router inside, a bias behind
    "dbrx": (("load",), "DbrxExperts"),  # all in one matrix
}
ON_ROAD = [(family, road) for family, (roads, _) in FAMILIES.items() for road in roads]
OFF_ROAD = [family for family, (roads, _) in FAMILIES.items() if "implementation" not in roads]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> its checkpoint, made when first asked for."""
    made = {}

    def folder(family):
        if family not in made:
            model = randomise(model_of(tiny(family), dtype=torch.float32))
            made[family] = save(model, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def experts_of(model, family):
    found = [m for m in model.modules() if type(m).__name__ == FAMILIES[family][1]]
    assert found, f"no {FAMILIES[family][1]} in {type(model).__name__}"
    return found


def prompts():
    """Unequal lengths, but none padded so far that a recurrent layer starts on nothing."""
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :2] = mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_decide_the_logits(family, folders):
    model = load(folders(family))
    expected = logits(model, prompts())
    for module in experts_of(model, family):
        for name, parameter in module.named_parameters():
            if name in ("down_proj", "output_linear.weight", "mlp.w2"):
                parameter.data.mul_(2)
    assert (logits(model, prompts()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "road"), ON_ROAD)
def test_logits_and_greedy_tokens_agree(family, road, folders):
    theirs = load(folders(family), experts_implementation="eager")
    ours = on_road(road, folders(family), torch.float32)
    assert ey.verify(ours).layers
    expected = logits(theirs, prompts())
    torch.testing.assert_close(logits(ours, prompts()), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy(ours, prompts()), greedy(theirs, prompts()))
    if road != "attach":
        return
    ey.detach(ours)
    assert torch.equal(logits(ours, prompts()), expected)


@pytest.mark.parametrize("family", OFF_ROAD)
def test_the_implementation_that_does_not_reach_them_is_told_by_verify(family, folders):
    model = load(folders(family), experts_implementation="expertyard")
    with pytest.raises(VerifyError, match=f"runs {FAMILIES[family][1]}, which experts_implementat"):
        ey.verify(model)


def test_one_matrix_is_not_attached_and_the_model_stays_as_it_was(folders):
    model = load(folders("dbrx"))
    expected = logits(model, prompts())
    with pytest.raises(KernelError, match=r"whose rows no kernel can read in place\. Load the"):
        ey.attach(model)
    assert torch.equal(logits(model, prompts()), expected)
