"""Training through torch.compile: the same losses, the same files, and plainly where nothing compiles."""

import pytest
from safetensors.torch import load_file

from nested_learning.memory.engines import compiler
from nested_learning.training import compiling
from nested_learning.training.config import TrainConfig
from nested_learning.training.run import train
from nested_learning.training.trainer import split_batch
from tests.graphs import counted

HOPE = {"mixer": "self_modifying_titans", "mixer_options": {"self_modifying_titans": {"chunk_size": 8}}}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs of blocks that were compiled; they run as they are, and so do those of the chunks within them."""
    with counted(monkeypatch, compiler, _broken=False, _rows={}), counted(monkeypatch, compiling) as found:
        yield found


def losses(outcome):
    return [loss for _, loss in outcome.result["losses"]["train"]]


def test_the_same_run_with_compiled_blocks(tiny, tmp_path, graphs):
    """Losses, names in checkpoints, the sample; and on from a checkpoint."""
    options = {"model": {**tiny().model, **HOPE}, "preset": "hope-tiny", "steps": 2, "save_every": 1}
    plain = train(tiny(**options))
    assert not graphs
    config = tiny(**options, compile=True, output=str(tmp_path / "compiled"))
    compiled = train(config)
    assert len(graphs) <= 4  # `_try_out`, training, evaluation
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-6)
    assert compiled.result["sample"]["prompt"] == plain.result["sample"]["prompt"]
    names = [
        load_file(outcome.folder.checkpoints / "checkpoint-2" / "model.safetensors").keys()
        for outcome in (plain, compiled)
    ]
    assert set(names[0]) == set(names[1])
    final = compiled.folder.result
    final.unlink()
    again = train(config, resume=True)
    assert losses(again) == losses(compiled)


def test_bf16_and_checkpointing(tiny, tmp_path, graphs):
    options = {
        "model": {**tiny().model, **HOPE},
        "preset": "hope-tiny",
        "steps": 2,
        "precision": "bf16",
        "gradient_checkpointing": True,
    }
    plain = losses(train(tiny(**options)))
    compiled = losses(train(tiny(**options, compile=True, output=str(tmp_path / "compiled"))))
    assert graphs
    assert compiled == pytest.approx(plain, abs=0.02)


def test_one_warning_where_nothing_compiles(tiny, tmp_path, monkeypatch):
    def backend(graph, _):
        raise RuntimeError("no compiler here")

    plain = losses(train(tiny(steps=1)))
    monkeypatch.setattr(compiling, "BACKEND", backend)
    with pytest.warns(RuntimeWarning, match="no compiler here"):
        compiled = train(tiny(steps=1, compile=True, output=str(tmp_path / "compiled")))
    assert losses(compiled) == plain


def test_compiled_copies_are_refused(monkeypatch):
    config = TrainConfig(compile=True, batch_size=4)
    assert split_batch(config, 1) == (4, 1)
    with pytest.raises(ValueError, match=r"compile is true with 2 processes .* \(FSDP2\)"):
        split_batch(config, 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert split_batch(config, 2) == (2, 1)
