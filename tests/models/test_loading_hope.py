"""Saving, loading and resizing: what transformers promises of any model."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from nested_learning import HopeForCausalLM, HopeModel
from tests.models.small_models import CASES, VOCAB, small_config, small_model


@pytest.fixture
def model(model):
    """Parameters away from every initial value, so that a re-initialised one is noticed."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# Tensors of a mapped file lie at odd addresses, where matrix products round in another order.
EXACT = {"rtol": 0, "atol": 1e-13}


def same(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_saved_and_loaded_gives_the_same_logits(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HopeForCausalLM
    assert same(loaded, model)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_auto_model_loads_the_model_without_head(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is HopeModel
    torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_in_another_dtype(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert same(loaded, copy.deepcopy(model).to(dtype))


@pytest.mark.parametrize("mixers", [list(dict.fromkeys(names)) for names in CASES.values()], ids=CASES)
def test_missing_weights_are_initialised_and_the_others_kept(model, tmp_path):
    """Drop one tensor at a time: it gets its initial distribution, every other is as saved."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = {name: tensor.clone() for name, tensor in load_file(path).items()}
    torch.manual_seed(0)
    fresh = HopeForCausalLM(model.config).state_dict()
    names = [n for n in saved if n.startswith(("model.layers.0.", "model.norm"))]
    for missing in names:
        save_file({n: t for n, t in saved.items() if n != missing}, path, {"format": "pt"})
        loaded = HopeForCausalLM.from_pretrained(tmp_path).state_dict()
        for name, tensor in saved.items():
            if name != missing:
                assert torch.equal(loaded[name], tensor), (missing, name)
        got, start = loaded[missing].double(), fresh[missing].double()
        assert not torch.equal(got, saved[missing].double())
        if float(start.std(correction=0)) < 1e-6:  # ones and the like
            torch.testing.assert_close(got, start)
        else:
            ratio = got.square().mean() / start.square().mean()
            assert 0.2 < float(ratio) < 5, missing


def test_from_config_on_the_meta_device_then_loading(model, ids):
    with torch.device("meta"):
        empty = HopeForCausalLM(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").double()
    empty.load_state_dict(model.state_dict())
    empty.tie_weights()
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


def test_to_empty_and_init_weights_give_a_fresh_model(mixers, ids):
    """Nothing a model needs lives outside of its parameters: no buffer is lost on the meta device."""
    with torch.device("meta"):
        model = HopeForCausalLM(small_config(mixers))
    assert list(model.buffers()) == []
    torch.manual_seed(0)
    model = model.to_empty(device="cpu")
    model.initialize_weights()
    model.tie_weights()
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_after_training_and_loading(mixers, ids, tmp_path, tied):
    model = small_model(mixers, tie_word_embeddings=tied)
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared == tied
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("size", [VOCAB + 9, VOCAB - 5])
def test_resizing_the_vocabulary(model, ids, tmp_path, size):
    ids = ids.clamp(max=VOCAB - 6)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.lm_head.out_features == size
    after = model(ids).logits
    assert after.shape[-1] == size
    keep = min(size, VOCAB)
    torch.testing.assert_close(after[..., :keep], before[..., :keep], rtol=0, atol=1e-12)
    labels = ids.clone()
    assert model(ids, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match=f"vocab_size {size}"):
        model(torch.full((1, 1), size))
    model.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after, **EXACT)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_foreign_configuration_is_refused():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="needs a HopeConfig, got LlamaConfig"):
        HopeForCausalLM(LlamaConfig())


def test_corrupt_weights_are_refused(tmp_path):
    small_model(["attention"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete|corrupt"):
        HopeForCausalLM.from_pretrained(tmp_path)


def test_trainer_accumulation_gives_the_gradient_of_one_batch(tmp_path, ids):
    """Trainer passes num_items_in_batch: rows with different numbers of labels weigh by token."""
    labels = ids[[0, 1, 2, 0]].clone()
    labels[1, 3:] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids[[0, 1, 2, 0]], labels, strict=True)]
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        model = small_model(["attention"])
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-7)


def test_text_generation_pipeline_with_the_byte_tokenizer(tmp_path):
    """A saved folder is all that transformers needs; padding in a batch changes nothing."""
    from transformers import pipeline

    from nested_learning.training.data import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = small_model(
        ["titans", "attention"], vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
    prompts = ["To be, or not", "Hi"]
    alone = [generate(prompt, **options)[0]["generated_token_ids"] for prompt in prompts]
    batch = generate(prompts, batch_size=2, **options)
    for prompt, one, (row,) in zip(prompts, alone, batch, strict=True):
        expected = model.generate(torch.tensor([list(prompt.encode())]), max_new_tokens=6, do_sample=False)[0]
        assert one == expected.tolist()
        assert row["generated_token_ids"][-6:] == one[-6:]
