"""States carried from block to block: as one long document, reset, resumed, refused."""

import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.cli.main import main
from nested_learning.models import preset
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.training.carried import CarriedRows, check_carries
from nested_learning.training.compare import CompareConfig, compare
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import dump_config
from nested_learning.training.data import DataConfig, build_data
from nested_learning.training.data.packing import IGNORED, TokenizedText
from nested_learning.training.data.streams import CarriedDataset
from nested_learning.training.models import model_config, new_model, preset_or_yaml
from nested_learning.training.optim import build_optimizer, build_schedule
from nested_learning.training.positions import loss_by_position, score_both_ways
from nested_learning.training.run import train
from nested_learning.training.run_folder import RunFolder

END = 29
MEMORY = {"chunk_size": 4}
MODELS = {
    "self_modifying_titans": {"mixer_options": {"self_modifying_titans": MEMORY}},
    "gated_deltanet": {"mixer_options": {"gated_deltanet": MEMORY}},
    "sliding_window_attention": {"mixer_options": {"sliding_window_attention": {"window": 5}}},
    "mag": {"mixer_options": {"mag": {"window": 5, "memory_options": MEMORY}}},
    "mac": {"mixer_options": {"mac": {"segment": 4}}},
}
UPDATES = {"none": {}, "regression": {"cms_update": "regression"}, "lm": {"cms_update": "lm"}}


def model_of(mixer="self_modifying_titans", **fields):
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        mixer=mixer,
        cms_levels=[{"chunk_size": 4}, {"chunk_size": 12}],
        **{**MODELS[mixer], **fields},
    )
    model = HopeForCausalLM(config).double()
    with torch.no_grad():  # so that what is learned in context changes what comes out
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def text(*lengths):
    ids = np.random.default_rng(0).integers(0, END, sum(lengths)).astype(np.uint16)
    ids[np.cumsum(lengths) - 1] = END
    return TokenizedText(ids, len(ids))


def losses_of(model, ids, **options):
    """-log p of each token of one row [T] but the first, from the logits of one pass."""
    logits = model(torch.as_tensor(ids.astype(np.int64))[None], **options).logits[0, :-1].log_softmax(-1)
    return -logits.gather(-1, torch.as_tensor(ids[1:].astype(np.int64))[:, None])[:, 0]


@pytest.mark.parametrize(
    ("mixer", "update"),
    [
        *((mixer, "none") for mixer in MODELS),
        ("self_modifying_titans", "regression"),
        *(
            pytest.param(mixer, update, marks=pytest.mark.slow)
            for mixer in MODELS
            for update in ("regression", "lm")
            if (mixer, update) != ("self_modifying_titans", "regression")
        ),
    ],
)
def test_losses_by_position_are_those_of_whole_documents_and_of_single_blocks(mixer, update):
    """Carried blocks are one long document; without the state each block is a document of its own."""
    model = model_of(mixer, **UPDATES[update]).eval()
    documents = [text(n).ids for n in (37, 5, 40, 8)]
    by_position: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}
    with torch.no_grad():
        for ids in documents:
            whole = losses_of(model, ids)
            apart = [losses_of(model, ids[i : i + 9]) for i in range(0, len(ids), 8)]  # with the token after
            for carry, found in ((True, whole), (False, torch.cat(apart))):
                for position, loss in enumerate(found.tolist(), 1):
                    by_position[carry].setdefault(position, []).append(loss)
    for carry, expected in by_position.items():
        got = loss_by_position(model, documents, 8, carry, rows=2)
        assert got["tokens"] == sum(len(d) - 1 for d in documents)
        for bucket in got["buckets"]:
            values = [x for p, each in expected.items() if bucket["from"] <= p < bucket["to"] for x in each]
            assert bucket["tokens"] == len(values)
            assert bucket["nats_per_token"] == pytest.approx(np.mean(values), abs=1e-9)
        assert [(b["from"], b["to"]) for b in got["buckets"]] == [(1, 16), (16, 32), (32, 40)]
    both = score_both_ways(model, documents, 8, rows=3)
    assert both["nats_per_token"]["carried"] != pytest.approx(both["nats_per_token"]["empty"], abs=1e-4)


def test_gradients_are_those_of_a_loop_that_detaches_at_block_ends():
    """Each row alone, each document from a cache of its own, cut from the graph where a block ends."""
    model = model_of(cms_update="regression")
    data = CarriedDataset(text(11, 30, 6, 21, 9), 8, rows=2, num_samples=12, end_of_text=END)
    states, caches = CarriedRows(model.config), [HopeCache(model.config) for _ in range(2)]
    resets = 0
    for step in range(6):
        samples = [data[2 * step + row] for row in range(2)]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        loss = model(**states.enter(batch)).loss
        got = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        states.leave()

        total, count = 0, 0
        for row, sample in enumerate(samples):
            starts = [0, *(np.flatnonzero(sample["position_ids"][1:] == 0) + 1), 8]
            for start, stop in pairwise(starts):
                if sample["position_ids"][start] == 0:
                    caches[row] = HopeCache(model.config)
                    resets += start > 0
                part, labels = (sample[key][start:stop] for key in ("input_ids", "labels"))
                logits = model(part[None], past_key_values=caches[row]).logits[0]
                total += nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
                count += (labels != IGNORED).sum()
        expected = torch.autograd.grad(total / count, list(model.parameters()), materialize_grads=True)
        caches = [cache.detach() for cache in caches]
        assert loss.item() == pytest.approx((total / count).item(), abs=1e-10)
        for g, e in zip(got, expected, strict=True):
            assert (g - e).abs().max() <= 1e-9 * (1 + e.abs().max())
    assert resets >= 3  # in the middle of a block


def test_the_state_crosses_blocks_but_not_documents_nor_rows():
    """Change row 0's first block: its second one changes until the next document begins; row 1 never does."""
    model = model_of().eval()
    ids = text(12, 30, 40).ids

    def outputs(change):
        data = CarriedDataset(TokenizedText(changed(ids, change), 82), 8, 2, 8, seed=1, end_of_text=END)
        states, found = CarriedRows(model.config), []
        for step in range(2):
            samples = [data[2 * step + row] for row in range(2)]
            batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
            with torch.no_grad():
                found.append(model(**states.enter(batch)).logits)
            states.leave()
        return torch.cat(found, 1)

    def changed(ids, place):
        other = ids.copy()
        if place is not None:
            other[place] = (other[place] + 1) % END
        return other

    plain, moved = outputs(None), outputs(3)
    [row] = {int(r) for r in (plain != moved).any(-1).any(-1).nonzero()[:, 0]}
    different = (plain != moved)[row].any(-1)
    assert different[3:12].all()  # across the end of the block at 8
    assert not different[:3].any()
    assert not different[12:].any()  # the document of 12 tokens has ended


def test_states_go_to_a_file_and_come_back_for_other_micro_batches(tmp_path):
    model = model_of("sliding_window_attention")
    data = CarriedDataset(text(11, 30, 6, 21), 8, rows=4, num_samples=12, end_of_text=END)

    def read(states, step, size):
        outputs = []
        for first in range(0, 4, size):
            samples = [data[4 * step + row] for row in range(first, first + size)]
            batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
            outputs.append(model(**states.enter(batch)).logits.detach())
            states.leave()
        return torch.cat(outputs)

    def new():
        return CarriedRows(model.config, data.fingerprint(), 4)

    states = new()
    for step in range(2):
        read(states, step, 1)
    expected = read(states, 2, 1)  # has gone on, as a step that is not taken in the end
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    states.save(folder, 2)
    assert len(list(folder.iterdir())) == 4
    again = new()
    again.load(folder, [0, 2], 2, torch.device("cpu"))
    assert torch.allclose(read(again, 2, 2), expected, atol=1e-12)

    for other, complaint in (
        (CarriedRows(model.config, "another", 4), "another text, or the same in another order"),
        (CarriedRows(model.config, data.fingerprint(), 8), r"another number of rows \(4, this run has 8\)"),
    ):
        with pytest.raises(ValueError, match=f"{complaint}.*start anew with --overwrite"):
            other.load(folder, [0], 4, torch.device("cpu"))
    (folder / "carried-2.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks carried states of rows 0 to 3"):
        new().load(folder, [0], 4, torch.device("cpu"))
    new().load(tmp_path / "checkpoint-0", [0], 4, torch.device("cpu"))  # before the first step there is none
    with pytest.raises(ValueError, match="block 2 of row 0 came without the one before it"):
        read(new(), 2, 1)


def test_attention_that_sees_everything_is_refused():
    with pytest.raises(ValueError, match=r"layers.0.mixer is softmax attention without a window.*window"):
        check_carries(
            HopeForCausalLM(HopeConfig(vocab_size=8, hidden_size=8, num_heads=2, mixer="attention"))
        )
    for mixer in MODELS:
        check_carries(model_of(mixer))


# Runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    """A folder of twenty documents of 30 to 400 bytes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(f"{n}" for n in rng.integers(0, 99, rng.integers(10, 130))))
    return folder


@pytest.fixture
def carried(tiny, library):
    """A function that gives the configuration of a tiny run that carries its state."""

    def config(output=None, **fields):
        data = DataConfig(
            source=str(library),
            block_size=16,
            max_validation_blocks=15,
            validation_fraction=0.2,
            carry_state=True,
        )
        model = {**tiny().model, "mixer_options": {"self_modifying_titans": {"chunk_size": 8}}}
        model = {**model, "cms_levels": [{"chunk_size": 16}, {"chunk_size": 48}], **fields.pop("model", {})}
        base = {
            "preset": "hope-tiny",
            "data": data,
            "model": model,
            "save_every": 4,
            "eval_every": 8,
            "sample_tokens": 0,
        }
        base |= {} if output is None else {"output": str(output)}
        return tiny(**{**base, **fields})

    return config


def losses(result):
    return [loss for _, loss in result["losses"]["train"]]


def test_a_run_carries_and_evaluates_as_a_loop_by_hand(carried, drawn):
    config = carried()
    result = train(config).result
    bundle = build_data(config.data, 32, 4)
    model = new_model(model_config(config.preset, config.model, bundle.tokenizer), 0)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, 8)
    states, expected = CarriedRows(model.config), []
    for step in range(8):
        samples = [bundle.train[4 * step + row] for row in range(4)]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        loss = model(**states.enter(batch)).loss
        loss.backward()
        states.leave()
        for p in model.parameters():  # a step that a parameter has no part in is one of gradient zero
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(result) == pytest.approx(expected, abs=1e-6)

    folder = RunFolder(config.output)
    trained = HopeForCausalLM.from_pretrained(folder.model)
    score = loss_by_position(trained, bundle.carried, 16, carry=True, rows=4)
    after = result["validation"]["after"]["nats_per_token"]
    assert after == pytest.approx(score["nats_per_token"], abs=1e-6)
    assert result["validation"]["blocks"] == sum(-(-len(d) // 16) for d in bundle.carried) <= 15
    positions = result["positions"]
    assert positions["nats_per_token"]["carried"] == pytest.approx(after, abs=1e-6)
    assert [row["carried"] for row in positions["table"]] == pytest.approx(
        [bucket["nats_per_token"] for bucket in score["buckets"]], abs=1e-6
    )
    assert positions["table"][0]["empty"] == positions["table"][0]["carried"]  # within the first block
    assert folder.positions.read_bytes().startswith(b"\x89PNG")
    assert result["files"]["positions"] == str(folder.positions)


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_size": 2},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"model": {"recompute": "chunk"}}, marks=pytest.mark.slow),
    ],
)
def test_the_same_run_in_other_ways(carried, tmp_path, fields):
    plain = train(carried(tmp_path / "plain")).result
    other = train(carried(tmp_path / "other", **fields)).result
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)
    assert other["tokens"] == plain["tokens"]


@pytest.mark.slow
def test_bf16_carries_nearly_the_same(carried, tmp_path):
    plain = losses(train(carried(tmp_path / "plain", steps=4)).result)
    half = losses(train(carried(tmp_path / "half", steps=4, precision="bf16")).result)
    assert half != plain
    assert half == pytest.approx(plain, abs=0.05)


@pytest.mark.parametrize("fields", [{"micro_batch_size": 2}, {"model": {"cms_update": "regression"}}])
def test_resumed_in_the_middle_of_documents_is_bit_equal(carried, tmp_path, fields):
    whole = train(carried(tmp_path / "whole", **fields))
    copy = tmp_path / "copy"
    shutil.copytree(whole.folder.path, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "checkpoint-8")
    saved = sorted(p.name for p in (copy / "checkpoints" / "checkpoint-4").glob("carried-*"))
    assert saved == [
        f"carried-{row}.safetensors" for row in ((0, 2) if "micro_batch_size" in fields else (0,))
    ]
    manifest = json.loads((copy / "checkpoints" / "checkpoint-4" / "manifest.json").read_text())
    assert set(saved) <= set(manifest["files"])

    resumed = train(carried(copy, **fields), resume=True)
    assert losses(resumed.result) == losses(whole.result)
    assert resumed.result["validation"] == whole.result["validation"]
    assert resumed.result["positions"] == whole.result["positions"]
    one, two = (load_file(o.folder.model / "model.safetensors") for o in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resuming_on_another_text_is_refused(carried, tmp_path, library):
    whole = train(carried(tmp_path / "run"))
    whole.folder.result.unlink()
    shutil.rmtree(whole.folder.checkpoints / "checkpoint-8")
    for each in library.iterdir():
        each.write_text(each.read_text().replace("7", "8"))
    with pytest.raises(
        ValueError, match=r"rows that read another text.*the text, the batch_size and the seeds"
    ):
        train(carried(tmp_path / "run"), resume=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "transformer-tiny"], "softmax attention without a window.*Set --model.mixer"),
        (
            ["--batch_size", "64"],
            "each of 64 rows read documents of its own, .* has 18: set --batch_size to 18",
        ),
        (["--data.score_length", "9999"], "score_length is 9999, but the longest of the 2 .* tokens: set"),
        (["--data", "hf:some"], "'hf:some' streams blocks that are shuffled together: save its text"),
    ],
)
def test_what_cannot_carry_is_refused_before_anything_is_written(library, tmp_path, capsys, flags, said):
    given = ["--data", str(library), "--data.carry_state", "true", "--block_size", "16", *flags]
    assert main(["train", *given, "--output", str(tmp_path / "new")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_a_run_without_carrying_is_scored_on_the_same_documents(carried, tmp_path):
    def config(carry):
        data = dataclasses.replace(carried().data, carry_state=carry, score_length=100)
        return carried(tmp_path / str(carry), data=data, steps=2)

    apart, along = (train(config(carry)).result for carry in (False, True))
    for key in ("documents", "tokens", "block_size"):
        assert apart["positions"][key] == along["positions"][key]
    assert apart["positions"]["tokens"] == 99 * apart["positions"]["documents"]
    assert apart["positions"]["table"][-1]["to"] == 100
    assert losses(apart) != losses(along)


def test_compare_carries_as_train_does(carried, tmp_path):
    yaml = tmp_path / "one.yaml"
    yaml.write_text(dump_config(carried()))
    optim = OptimConfig(lr=1e-2)
    data = dataclasses.replace(carried().data, score_length=100)
    config = CompareConfig(
        models=[str(yaml)],
        data=data,
        optim=optim,
        lrs=[1e-2],
        steps=8,
        batch_size=4,
        validation_batches=4,
        memory=False,
    )
    result = compare(config)
    trained = train(
        carried(tmp_path / "run", data=dataclasses.replace(data, max_validation_blocks=16))
    ).result
    [run] = result["runs"]
    assert run["train_losses"] == pytest.approx(losses(trained), abs=1e-5)
    assert run["nats_per_token"] == pytest.approx(trained["validation"]["after"]["nats_per_token"], abs=1e-5)
    [model] = result["models"]
    expected = trained["positions"]
    for mode in ("empty", "carried"):
        assert [row[mode] for row in model["positions"]["table"]] == pytest.approx(
            [row[mode] for row in expected["table"]], abs=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("update", ["regression", "lm"])
def test_levels_that_learn_in_context_train_carried(carried, tmp_path, update):
    """A level whose chunk is longer than a block writes only where the state is carried."""
    fields = {"model": {"cms_update": update}, "steps": 40, "save_every": 40}
    along = train(carried(tmp_path / "along", **fields)).result
    assert losses(along)[-1] < losses(along)[0] - 1.5
    assert (
        along["positions"]["nats_per_token"]["carried"]
        < along["validation"]["before"]["nats_per_token"] - 1.5
    )


def test_the_transformer_of_the_comparison_has_a_state_as_large_as_that_of_hope():
    """Inside a chunk, where hope-tiny holds anchors beside the current weights."""
    sizes = []
    for name in ("hope-tiny", str(Path(__file__).parents[2] / "configs" / "transformer-window.yaml")):
        base, fields = preset_or_yaml(name)
        model = HopeForCausalLM(preset(base, **fields)).eval()
        with torch.no_grad():
            cache = model(torch.zeros(1, 400, dtype=torch.long), use_cache=True).past_key_values
        sizes.append(cache.nbytes())
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)
