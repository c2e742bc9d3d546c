"""Fixtures: a small model per mixer, and some ids for it."""

import pytest
import torch

from nested_learning import HopeForCausalLM
from tests.models.small_models import CASES, VOCAB, small_model


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
