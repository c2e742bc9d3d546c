"""Sharded blocks that would be gathered in different numbers by different processes are refused."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.models.hope.block_hope import HopeBlock
from nested_learning.models.hope.sharded_hope import check_passes


class ShardedBlock(FSDPModule, HopeBlock):
    """A block as `fully_shard` makes its class, without its hooks."""


@pytest.mark.parametrize("given", ["mask", "documents"])
def test_padded_rows_and_documents(given):
    config = HopeConfig(
        hidden_size=8, num_hidden_layers=2, num_heads=2, vocab_size=11, mixer="deltanet",
        cms_levels=[{"chunk_size": 4}], cms_update="lm",
    )  # fmt: skip
    model = HopeForCausalLM(config)
    ids = torch.arange(8).reshape(1, 8)
    extra = {
        "mask": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])},
        "documents": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])},
    }[given]
    assert torch.isfinite(model(ids, **extra).logits).all()
    model.model.layers[1].__class__ = ShardedBlock
    with pytest.raises(ValueError, match="do not shard blocks"):
        model(ids, **extra)
    check_passes(model.model.layers, None, None)  # full rows pass as often in every process
