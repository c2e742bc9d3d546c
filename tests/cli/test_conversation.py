from __future__ import annotations

import torch

from nested_learning import HopeForCausalLM
from nested_learning.cli.conversation import Conversation
from nested_learning.models.presets import preset
from nested_learning.training.data import byte_tokenizer


def test_a_text_that_begins_like_the_conversation_is_read_whole():
    """Reading a document a second time is new text, not the text the cache already holds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
    model = HopeForCausalLM(preset("hope-tiny", **sizes)).eval()
    tokenizer = byte_tokenizer()
    again = Conversation.open(model, tokenizer, None)
    with torch.no_grad():
        model(torch.tensor([list(b"ab")]), past_key_values=again.cache)
    whole = Conversation.open(model, tokenizer, None)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert again.generate("abab", **options) == whole.generate("ababab", **options)
    assert again.cache.get_seq_length() == whole.cache.get_seq_length()
