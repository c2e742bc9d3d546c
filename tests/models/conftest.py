"""Fixtures: a small model per mixer, and some ids for it."""

import pytest
import torch

from nested_learning import HopeForCausalLM
from tests.models.small_models import CASES, VOCAB, small_model

# The tensors are tiny: a second thread costs ten times what it brings, more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(params=CASES)
def mixers(request) -> list[str]:
    return CASES[request.param]


@pytest.fixture
def model(mixers) -> HopeForCausalLM:
    """Float64, in evaluation mode."""
    return small_model(mixers)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
