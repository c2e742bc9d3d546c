"""Conversations as text: what the tokenizers' template writes, and that models can use it."""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from nested_learning.training.data import byte_tokenizer, train_bpe
from tests.models.small_models import small_model

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, \nü!"},
    {"role": "assistant", "content": "Hello. {{ x }}"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " So long"},
]
TEXT = (
    "System: Be brief.\nUser: Hi, \nü!\nAssistant: Hello. {{ x }}<|endoftext|>User: Bye\n"
    "Assistant:  So long<|endoftext|>"
)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, tmp_path):
    """As `AutoTokenizer` loads it from a folder."""
    made = byte_tokenizer() if request.param == "byte" else train_bpe(["User: a\nAssistant: b hi\n" * 9], 300)
    made.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_the_text(tokenizer):
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == TEXT
    prompt = tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert prompt == TEXT[: TEXT.rindex(" ") - 3].rstrip() == TEXT[: TEXT.index("  So")]
    started = tokenizer.apply_chat_template(TALK, tokenize=False, continue_final_message=True)
    assert started == TEXT.removesuffix("<|endoftext|>")


def test_a_prompt_is_a_prefix_of_the_conversation_in_ids(tokenizer):
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    for turns in (2, 4):
        prompt = tokenizer.apply_chat_template(TALK[:turns], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole) == TEXT


def test_answers_are_marked_with_their_ends(tokenizer):
    out = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, learn in zip(out["input_ids"], out["assistant_masks"], strict=True) if learn]
    assert tokenizer.decode(marked) == " Hello. {{ x }}<|endoftext|>  So long<|endoftext|>"


def test_a_pipeline_answers_a_conversation():
    tokenizer = byte_tokenizer()
    model = small_model(["titans", "attention"], vocab_size=len(tokenizer))
    ids = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=False)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    new = model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = chat(TALK[:2], **options)[0]["generated_text"][-1]
    assert answer == {"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)}
