"""State dicts of a model, to compare before and after."""

import torch


def state_of(model):
    """Return a copy of a model's state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, state):
    """Check that a model's tensors equal those of `state`, tensors or arrays."""
    for key, value in model.state_dict().items():
        assert torch.equal(value, torch.as_tensor(state[key])), key
