"""Labels scored as answers: many at once by their common beginnings, and the most probable one."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config

from nested_learning.evals.methods.pretrained import Base
from nested_learning.evals.methods.pretrained.asking import View, _keys_and_values, most_probable
from nested_learning.evals.methods.pretrained.base import random_llama
from nested_learning.evals.methods.pretrained.trie import Trie
from nested_learning.evals.tasks.streams.wording import Wording
from nested_learning.training.data import byte_tokenizer

LABELS = [[5, 6, 9], [5, 6, 7, 9], [5, 8, 9], [3, 9]]
WORDING = Wording(Base(None, byte_tokenizer(), None))


@pytest.fixture(scope="module")
def model():
    return random_llama().eval()


def separately(model, prompt, label):
    """Log-probability of a label alone behind a prompt."""
    logits = model(torch.tensor([[*prompt, *label]])).logits[0]
    return -cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(label), reduction="sum")


@pytest.mark.parametrize("before", [[], [17, 4, 30, 8, 21]])
@pytest.mark.parametrize("labels", [LABELS, [[7]], [[3], [4], [5]]])
def test_a_label_scores_what_it_scores_alone(before, labels):
    model, prompt = random_llama().double().eval(), [11, 12, 13]
    context = _keys_and_values(View(model, torch.tensor(before, dtype=torch.long)))
    expected = torch.stack([separately(model, [*before, *prompt], label) for label in labels])
    trie = Trie.of(labels)
    torch.testing.assert_close(trie.scores(model, prompt, context), expected.detach(), rtol=1e-9, atol=1e-9)
    # the context is as it was
    torch.testing.assert_close(trie.scores(model, prompt, context), expected.detach(), rtol=1e-9, atol=1e-9)


def test_learned_positions_and_lower_precision():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = torch.stack([separately(model, [11, 12], label) for label in LABELS]).detach()
    torch.testing.assert_close(Trie.of(LABELS).scores(model, [11, 12]), expected, rtol=1e-4, atol=1e-4)
    found = Trie.of(LABELS).scores(model.to(torch.bfloat16), [11, 12])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)


def test_a_trie_shares_beginnings():
    trie = Trie.of(LABELS)
    assert trie.nodes.tolist() == [5, 6, 7, 8, 3]  # neither 5 twice nor any end
    assert trie.depths.tolist() == [0, 1, 2, 1, 0]
    assert trie.lengths.tolist() == [3, 4, 3, 2]


@pytest.mark.parametrize("labels", [[], [[]], [[1, 2], [1]], [[1, 2], [1, 2]]])
def test_labels_must_exclude_each_other(labels):
    with pytest.raises(ValueError, match="none that another begins with"):
        Trie.of(labels)


def test_the_most_probable_label_is_chosen(model):
    labels = [WORDING.label(label) for label in ("pay bill", "pay bill later", "visa")]
    prompt = WORDING.prompt("hello")
    scores = [separately(model, prompt, label).item() for label in labels]
    best = scores.index(max(scores))
    assert most_probable(View(model), [prompt], labels) == [best]
    assert most_probable(View(model), [prompt], labels[::-1]) == [2 - best]


# -- forgetting
