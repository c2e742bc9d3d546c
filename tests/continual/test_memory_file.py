"""Saving, loading, resetting: what a file holds, and which files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nested_learning import _tensor_files
from nested_learning._tensor_files import checksum
from nested_learning.continual import Level, files, stack_levels
from tests.continual.test_invariances import LEVELS, assert_equal_contents, contents, learner_on
from tests.continual.tiny_models import random_ids, tiny_model

UP = "model.layers.0.mlp.up_proj.weight"


def rewrite(path, change, *, old=False, checked=True):
    """Change the tensors and metadata of a file, and give it the checksum of what it holds then.

    Without `checked` it keeps the checksum that it had; with `old` it is of the version that had none.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if old:
        del metadata["sha256"], metadata["checked"]
        metadata["version"] = "1"
    change(tensors, metadata)
    if checked and not old:
        names = [name for name in json.loads(metadata["checked"]) if name in metadata]
        metadata["checked"] = json.dumps(names)
        metadata["sha256"] = checksum(tensors, metadata, names)
    save_file(tensors, path, metadata)


@pytest.fixture
def saved(tmp_path):
    learner = learner_on()
    learner.observe(random_ids(37))
    path = tmp_path / "memory.safetensors"
    learner.memory.save(path)
    return learner, path


@pytest.mark.parametrize("rule", ["gd", "momentum", "adam", "m3"])
def test_reading_goes_on_as_if_nothing_had_happened(tmp_path, rule):
    """Saved in the middle of all chunks: bit for bit the same afterwards."""
    levels = [Level(4, 0.3, rule=rule, gate_quantile=0.2), *LEVELS[1:]]
    first, second = learner_on(levels=levels), learner_on(levels=levels)
    for learner in (first, second):
        learner.observe(random_ids(2, 37), learn_mask=random_ids(2, 37, seed=2) > 15)
    first.memory.save(tmp_path / "m")
    loaded = learner_on(levels=levels)
    loaded.memory.load(tmp_path / "m")
    more = random_ids(2, 16, seed=1)
    assert torch.equal(loaded.observe(more), second.observe(more))
    for row in (0, 1):
        assert_equal_contents(contents(loaded, row), contents(second, row))


def test_a_file_from_before_there_were_masks(saved):
    """Everything was learned then."""
    learner, path = saved

    def without_mask(tensors, metadata):
        del tensors["0/mask"]

    rewrite(path, without_mask, old=True)
    loaded = learner_on()
    with pytest.warns(RuntimeWarning, match="without checksums"):
        loaded.memory.load(path)
    more = random_ids(30, seed=1)
    assert torch.equal(loaded.observe(more), learner.observe(more))
    assert_equal_contents(contents(loaded), contents(learner))


class TestPlainDescentIsAlsoCalledSgd:
    def test_by_a_level(self):
        assert Level(4, 0.3, rule="sgd") == Level(4, 0.3, rule="gd") == Level(4, 0.3)
        assert Level(4, 0.3, rule="sgd").describe()["rule"] == "gd"

    @pytest.mark.parametrize("written", ["sgd", "gd"])
    @pytest.mark.parametrize("rule", ["sgd", "gd"])
    def test_in_a_file(self, tmp_path, written, rule):
        """Files from before "gd" have "sgd", also beside levels with other rules."""
        levels = [[Level(4, 0.3, rule=name), Level(8, 0.1, rule="adam")] for name in (written, rule)]
        learner, loaded = learner_on(levels=levels[0]), learner_on(levels=levels[1])
        learner.observe(random_ids(37))
        path = tmp_path / "memory.safetensors"
        learner.memory.save(path)

        def as_before(tensors, metadata):
            settings = json.loads(metadata["levels"])
            settings[0]["rule"] = written
            metadata["levels"] = json.dumps(settings, sort_keys=True)

        rewrite(path, as_before, old=True)
        with pytest.warns(RuntimeWarning, match="without checksums"):
            loaded.memory.load(path)
        assert_equal_contents(contents(loaded), contents(learner))
        more = random_ids(30, seed=1)
        assert torch.equal(loaded.observe(more), learner.observe(more))
        other = learner_on(levels=[Level(4, 0.3, rule="momentum"), levels[1][1]])
        with pytest.raises(ValueError, match="other levels"):
            other.memory.load(path)


def test_the_file_has_nothing_of_the_base_model(saved):
    learner, path = saved
    with safe_open(path, framework="pt") as file:
        kinds = {name.split("/")[2] for name in file.keys() if name.split("/")[1].isdigit()}  # noqa: SIM118
        others = {name.split("/")[1] for name in file.keys()} - {"0", "1", "2"}  # noqa: SIM118
    assert kinds == {"delta", "sum", "rule"}
    assert others == {"tokens", "mask", "keys", "values"}
    assert learner.memory.nbytes < os.path.getsize(path) < learner.memory.nbytes + 40_000


def test_a_bfloat16_copy_of_the_base_model_is_the_same_model(saved):
    _, path = saved
    model = tiny_model().to(torch.float32)
    learner = learner_on(model)
    learner.memory.load(path)
    assert all(delta.dtype == torch.float32 for delta in learner.memory.diff().values())
    assert files.fingerprint(tiny_model().to(torch.bfloat16)) == files.fingerprint(tiny_model())


class TestRefused:
    @pytest.mark.parametrize(
        ("learner", "message"),
        [
            (lambda: learner_on(tiny_model(seed=1)), "belongs to another base model"),
            (lambda: learner_on(tiny_model(layers=3)), "belongs to another base model"),
            (lambda: learner_on(levels=[Level(4, 0.3)]), "other levels"),
            (lambda: learner_on(modules=["mlp.up_proj"]), "other weights"),
            (lambda: learner_on(window=30), "other reading"),
        ],
    )
    def test_of_another_learner(self, saved, learner, message):
        learner = learner()
        with pytest.raises(ValueError, match=message):
            learner.memory.load(saved[1])
        assert learner.memory.is_empty

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, m: m.update(version="99"), "format version '99', this package reads '1' and '2'"),
            (lambda t, m: m.update(format="x"), "not the memory of a learner"),
            (lambda t, m: m.pop("rows"), "damaged"),
            (lambda t, m: t.pop("0/tokens"), "damaged"),
            (
                lambda t, m: t.update({f"0/0/delta/{UP}": torch.ones(2)}),
                r"damaged.*shape",
            ),
        ],
    )
    def test_damaged(self, saved, change, message):
        learner, path = saved
        rewrite(path, change)
        before = contents(learner)
        with pytest.raises(ValueError, match=message):
            learner.memory.load(path)
        assert_equal_contents(contents(learner), before)

    def test_truncated_and_missing(self, saved, tmp_path):
        learner, path = saved
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="truncated, damaged"):
            learner.memory.load(path)
        with pytest.raises(FileNotFoundError, match="no memory file"):
            learner.memory.load(tmp_path / "none")


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    learner, path = saved
    old = path.read_bytes()

    def write_half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(_tensor_files, "save_file", write_half)
    learner.observe(random_ids(9))
    with pytest.raises(OSError, match="No space left"):
        learner.memory.save(path)
    assert path.read_bytes() == old
    assert {p.name for p in path.parent.iterdir()} <= {path.name, f"{path.name}.lock"}


class TestLock:
    def test_another_process_is_refused(self, saved):
        learner, path = saved
        code = (
            "import sys, filelock\n"
            f"with filelock.FileLock({str(path) + '.lock'!r}): print('held', flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert other.stdout.readline() == "held\n"
            for use in (learner.memory.save, learner.memory.load):
                with pytest.raises(ValueError, match="in use by another process"):
                    use(path)
        finally:
            other.kill()  # the lock ends with the process
            other.wait()
        learner.memory.save(path)

    def test_held_for_a_session(self, saved):
        learner, path = saved
        with learner.memory.lock(path):
            learner.memory.load(path)
            learner.memory.save(path)
            with pytest.raises(ValueError, match="in use"):
                learner_on().memory.load(path)
        learner_on().memory.load(path)


class TestPaths:
    def test_what_is_no_regular_file_is_refused_and_nothing_made(self, saved, tmp_path):
        learner, _ = saved
        folder = tmp_path / "own"
        folder.mkdir()
        os.mkfifo(folder / "pipe")
        for use in (learner.memory.save, lambda path: learner.memory.lock(path).__enter__()):
            with pytest.raises(ValueError, match="it is a pipe"):
                use(folder / "pipe")
            with pytest.raises(FileNotFoundError, match="there is no folder"):
                use(folder / "missing" / "memory")
        for name in ("pipe", "missing", "missing/memory", "."):
            with pytest.raises(FileNotFoundError, match="no memory file"):
                learner.memory.load(folder / name)
        assert os.listdir(folder) == ["pipe"]

    def test_two_names_of_one_file_share_its_lock(self, saved):
        learner, path = saved
        link = path.with_name("link")
        link.symlink_to(path.name)
        path.chmod(0o640)
        with learner.memory.lock(link):
            learner.memory.save(path)
            learner.memory.load(link)
            for name in (path, link):
                with pytest.raises(ValueError, match="in use"):
                    learner_on().memory.load(name)
        learner.memory.save(link)
        assert link.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o640
        assert not link.with_name("link.lock").exists()


class TestReset:
    def test_everything(self):
        learner = learner_on()
        learner.observe(random_ids(37))
        learner.memory.reset()
        assert_equal_contents(contents(learner), contents(learner_on()))

    def test_one_level(self):
        learner = learner_on()
        learner.observe(random_ids(40))
        kept = learner.memory.diff(level=0)
        learner.memory.reset(level=1)
        assert not learner.memory.diff(level=1)
        for name, delta in learner.memory.diff(level=0).items():
            assert torch.equal(delta, kept[name])
        with pytest.raises(ValueError, match="level must be from 0"):
            learner.memory.reset(level=3)

    def test_one_level_in_the_middle_of_its_chunk(self):
        """The slower level still learns from all of its own chunk."""
        levels = [Level(4, 0.0), Level(8, 0.0001, layers=[1]), Level(16, 0.1)]
        learner, other = learner_on(levels=levels), learner_on(levels=levels)
        ids = random_ids(16)
        learner.observe(ids[:4])
        learner.memory.reset(level=1)
        learner.observe(ids[4:])
        other.observe(ids)
        for name, delta in other.memory.diff(level=2).items():
            torch.testing.assert_close(learner.memory.diff(level=2)[name], delta, rtol=1e-3, atol=1e-6)

    def test_snapshots_fit_another_learner(self):
        learner = learner_on()
        learner.observe(random_ids(40))
        fresh = stack_levels(tiny_model(), levels=LEVELS, window=24, overlap=5)
        fresh.memory.restore(learner.memory.snapshot())
        assert torch.equal(fresh.logits(random_ids(1, 9)), learner.logits(random_ids(1, 9)))


def test_metadata_is_readable_without_the_package(saved):
    with safe_open(saved[1], framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["levels"])[1]["chunk_size"] == 7
    assert json.loads(metadata["rows"])[0]["position"] == 37
