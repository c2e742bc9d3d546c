"""peft's prompts that are learned: as embedded input they work, as key-value caches they are refused."""

from __future__ import annotations

import pytest
import torch

from tests.models.small_models import VOCAB, small_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow
VIRTUAL = 3


@pytest.fixture
def model():
    return small_model(["titans", "attention"]).float()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


def test_prompt_tuning(model, ids):
    """Learned rows before the embedded ids: logits, gradient and generated ids are those of that input."""
    embedded = model.get_input_embeddings()(ids).detach()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    tuned = peft.get_peft_model(model, config)
    prompt = tuned.prompt_encoder["default"].embedding.weight
    rows = torch.cat([prompt.expand(len(ids), -1, -1), embedded], dim=1)
    labels = torch.cat([torch.full((len(ids), VIRTUAL), -100), ids], dim=1)
    expected = model(inputs_embeds=rows, labels=labels)
    (gradient,) = torch.autograd.grad(expected.loss, prompt)

    out = tuned(input_ids=ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(prompt.grad, gradient)
    assert all(parameter.grad is None for name, parameter in tuned.named_parameters() if "prompt" not in name)

    options = {"max_new_tokens": 4, "do_sample": False}
    got = tuned.generate(input_ids=ids, **options)[:, ids.shape[1] :]
    assert torch.equal(got, model.generate(inputs_embeds=rows, **options))


def test_prefix_tuning_is_refused(model, ids):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    with pytest.raises(ValueError, match="past_key_values must be a HopeCache, got DynamicCache"):
        peft.get_peft_model(model, config)(input_ids=ids)
