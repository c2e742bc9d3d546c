"""Parts of a layer that another one reads, in the wrappers that peft puts around them."""

from __future__ import annotations

import pytest
import torch

from tests.models.small_models import VOCAB, small_model

peft = pytest.importorskip("peft")
IDS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def cached(model):
    cache, found = None, []
    for i in range(0, 11):
        out = model(input_ids=IDS[:, [i]], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("mixer", ["mag", "mal"])
def test_attention_that_is_trained_as_a_copy(mixer):
    model = small_model([mixer])
    plain = logits(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["up"], modules_to_save=["attention"])
    tuned = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(tuned), plain)
    tuned(input_ids=IDS).logits.square().sum().backward()
    names = [name for name, p in tuned.named_parameters() if name.endswith("default.persistent")]
    assert len(names) == 1
    p = tuned.get_parameter(names[0])
    assert p.grad.abs().max() > 0
    with torch.no_grad():
        p.mul_(-2)
    changed = logits(tuned)
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(cached(tuned), changed)
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), plain)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), changed)


def test_persistent_tokens_that_change_within_the_attention_alone_are_refused():
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["up"], target_parameters=["attention.persistent"], r=2
    )
    tuned = peft.get_peft_model(small_model(["mag"]), config)
    with pytest.raises(ValueError, match=r"has no persistent to read outside .* target_parameters"):
        logits(tuned)


@pytest.mark.parametrize("mixer", ["titans", "self_modifying_titans", "deltanet"])
def test_tuning_of_the_norm_over_a_heads_outputs(mixer):
    model = small_model([mixer])
    plain = logits(model)
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["out_norm"])
    tuned = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(tuned), plain)
    tuned(input_ids=IDS).logits.square().sum().backward()
    [p] = [p for p in tuned.parameters() if p.requires_grad]
    assert p.grad.abs().max() > 0
    with torch.no_grad():
        p.mul_(torch.linspace(0.5, 2, len(p)))
    changed = logits(tuned)
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(cached(tuned), changed)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), changed)
