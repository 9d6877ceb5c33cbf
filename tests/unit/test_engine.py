"""A recipe changes how a network runs and nothing else; without one nothing changes."""

import copy

import torch

from longlive.engine.apply import Recipe, apply


def passes(network):
    """The output of a pass and the gradients of its mean square, by name."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 3, 4, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    output = network(x, torch.full((2, 3), 500.0), text)
    output.square().mean().backward()
    return output, {name: parameter.grad for name, parameter in network.named_parameters()}


def test_recipes_combine(model):
    results = {}
    for checkpointing in (False, True):
        for bfloat16 in (False, True):
            network = copy.deepcopy(model)
            apply(network, Recipe(checkpointing=checkpointing, bfloat16_linears=bfloat16))
            assert list(network.state_dict()) == list(model.state_dict())
            results[checkpointing, bfloat16] = passes(network)
    assert torch.equal(results[False, False][0], passes(model)[0])
    assert not torch.equal(results[False, True][0], results[False, False][0])
    for bfloat16 in (False, True):  # checkpointing changes no number
        torch.testing.assert_close(results[True, bfloat16], results[False, bfloat16], atol=0, rtol=0)


def test_a_recipe_may_be_applied_to_some_networks_only(model):
    other = copy.deepcopy(model)
    before = passes(other)[0]
    apply(model, Recipe(checkpointing=True, bfloat16_linears=True))
    assert torch.equal(passes(other)[0], before)
