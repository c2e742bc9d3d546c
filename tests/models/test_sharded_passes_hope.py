"""Sharded blocks that would be gathered in different numbers by different processes are refused."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.models.hope.block_hope import HopeBlock
from nested_learning.models.hope.sharded_hope import check_passes


class ShardedBlock(FSDPModule, HopeBlock):
    """A block as `fully_shard` makes its class, without its hooks."""


def test_documents():
    config = HopeConfig(
        hidden_size=8, num_hidden_layers=2, num_heads=2, vocab_size=11, mixer="deltanet",
        cms_levels=[{"chunk_size": 4}], cms_update="lm",
    )  # fmt: skip
    model = HopeForCausalLM(config)
    ids, positions = torch.arange(8)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    assert torch.isfinite(model(ids, position_ids=positions).logits).all()
    model.model.layers[1].__class__ = ShardedBlock
    with pytest.raises(ValueError, match="do not shard blocks"):
        model(ids, position_ids=positions)
    check_passes(model.model.layers, None)  # rows of one document pass as often in every process
