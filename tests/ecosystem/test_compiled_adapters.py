"""Compiled generation with peft's adapters, which change from call to call."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import CompileConfig

from tests.models.small_models import VOCAB, small_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def tuned():
    """Two layers under two adapters, the first of them with another scale in each layer."""
    model = small_model(["sliding_window_attention", "sliding_window_attention"])
    options = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 2, "target_modules": ["up", "down"]}
    pattern = {r"layers\.0\.cms\.blocks\.\d\.up": 4, r"layers\.1\.cms\.blocks\.\d\.up": 40}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options, alpha_pattern=pattern))
    tuned.add_adapter("b", peft.LoraConfig(**options))
    return tuned.double().eval()


def logits(model, **how):
    ids = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 4, "pad_token_id": 0, "output_logits": True, **how}
    return torch.stack(model.generate(input_ids=ids, return_dict_in_generate=True, **how).logits)


def check(model, **how):
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    plain = logits(model, **how)
    torch.testing.assert_close(logits(model, compile_config=config, **how), plain, rtol=1e-9, atol=1e-9)
    return plain


def test_the_adapter_of_the_moment_answers(tuned):
    found = [check(tuned)]
    tuned.set_adapter("b")
    found.append(check(tuned))
    with tuned.disable_adapter():
        found.append(check(tuned))
    tuned.set_adapter("default")
    for module in tuned.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    found.append(check(tuned))
    tuned.merge_adapter()
    torch.testing.assert_close(check(tuned), found[-1])
    tuned.unmerge_adapter()
    for one, other in pairwise(found):
        assert not torch.allclose(one, other)


def test_each_row_has_its_own_adapter(tuned):
    both = check(tuned, adapter_names=["default", "b"])
    turned = check(tuned, adapter_names=["b", "default"])
    assert not torch.allclose(both[:, 0], turned[:, 0])
    check(tuned, adapter_names=["__base__", "b"])
