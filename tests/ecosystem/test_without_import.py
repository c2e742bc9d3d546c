"""A saved folder loads in a process that has not imported the package, and says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.models import hope
from nested_learning.models.hope.auto_hope import AUTO_MAP
from nested_learning.training.data import byte_tokenizer
from tests.models.small_models import small_config, small_model

ROOT = Path(__file__).parents[2]
CODE = "nested_learning_hope.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder of a small model in float64 and its tokenizer."""
    tokenizer = byte_tokenizer()
    small_model(["titans", "attention"], vocab_size=len(tokenizer)).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def run(script: str, *arguments: str | Path, cache: Path) -> str:
    """Standard output of a script in a new process, without a network, with a cache of modules of its own."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

saved, again = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
messages = []
for load in (AutoModel, AutoModelForCausalLM):
    try:
        load.from_pretrained(saved)
    except ValueError as error:
        messages.append(str(error))
assert "nested_learning" not in sys.modules

model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
from nested_learning import HopeConfig, HopeForCausalLM, HopeModel
assert type(model) is HopeForCausalLM and type(model.config) is HopeConfig
assert type(AutoModel.from_pretrained(saved, trust_remote_code=True)) is HopeModel
assert type(AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)) is HopeForCausalLM
logits = model(**tokenizer("abc", return_tensors="pt")).logits

# a second name for the same thing, and what transformers does to classes that it loaded from code
HopeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
arguments = TrainingArguments(again, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}]
Trainer(model.float(), arguments, train_dataset=rows).train()
print(json.dumps({
    "messages": messages,
    "logits": logits.tolist(),
    "text": pipeline("text-generation", model=saved, trust_remote_code=True)("abc", max_new_tokens=4),
}))
"""


def test_a_process_that_has_not_imported_the_package(folder, tmp_path):
    again = tmp_path / "again"
    out = json.loads(run(LOAD, folder, again, cache=tmp_path / "cache").splitlines()[-1])
    assert len(out["messages"]) == 2
    assert all("trust_remote_code=True" in message for message in out["messages"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(b"abc")])
    torch.testing.assert_close(torch.tensor(out["logits"], dtype=torch.float64), model(ids).logits)
    assert out["text"][0]["generated_text"].startswith("abc")
    # What was trained there and saved is as what is saved here.
    checkpoint = again / "checkpoint-1"
    assert (checkpoint / CODE).read_bytes() == (folder / CODE).read_bytes()
    assert not list(checkpoint.glob("modeling*.py"))
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == AUTO_MAP


REFUSED = """
import json, os, sys
from transformers import AutoModelForCausalLM

saved, foreign = sys.argv[1:]
def message():
    try:
        AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    except ImportError as error:
        return str(error)

# without the package: not on the path, and not by the finder of an editable installation
sys.path[:] = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, "nested_learning"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
missing = message()
sys.path.insert(0, foreign)
print(json.dumps({"missing": missing, "foreign": message(), "again": message(),
                  "ran": "nested_learning" in sys.modules}))
"""


def test_without_the_package_and_with_another_of_its_name(folder, tmp_path):
    foreign = tmp_path / "foreign" / "nested_learning"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("HopeConfig = HopeForCausalLM = HopeModel = object\n")
    out = json.loads(run(REFUSED, folder, foreign.parent, cache=tmp_path / "cache").splitlines()[-1])
    assert "is not there" in out["missing"]
    assert "another project" in out["foreign"]
    assert str(foreign) in out["foreign"]
    assert out["again"] == out["foreign"]
    assert not out["ran"]  # a stranger's code is not run either
    for text in (out["missing"], out["foreign"]):
        assert "pip install nested-learning-torch" in text
        assert "pip install nested_learning" not in text


def test_transformers_sees_no_package_to_recommend(folder):
    """It names imports outside of the standard library that fail; on the index this one is a stranger's."""
    assert "nested_learning" not in get_imports(folder / CODE)
    assert set(get_imports(folder / CODE)) <= sys.stdlib_module_names


def test_the_map_names_what_is_registered():
    """Every auto class that knows HopeConfig, and no other, stands in the map with its class."""
    registered = {"AutoConfig": HopeConfig}
    for name in dir(transformers):
        mapping = (
            getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("Auto") else None
        )
        if mapping is not None and HopeConfig in mapping:
            registered[name] = mapping[HopeConfig]
    assert {name: f"nested_learning_hope.{cls.__name__}" for name, cls in registered.items()} == AUTO_MAP
    assert all(getattr(hope, cls.__name__) is cls for cls in registered.values())


def test_configurations_carry_the_map(tmp_path):
    config = small_config(["attention"])
    assert config.auto_map == AUTO_MAP
    config.auto_map["AutoModel"] = "other.Model"  # as `register_for_auto_class` does for one's own class
    assert small_config(["attention"]).auto_map == AUTO_MAP
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.auto_map == {**AUTO_MAP, "AutoModel": "other.Model"}
    assert (tmp_path / CODE).is_file()


def test_a_folder_without_the_map_loads(folder):
    """As earlier versions wrote them."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["auto_map"]
    path.write_text(json.dumps(fields))
    (folder / CODE).unlink()
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is HopeForCausalLM
    assert AutoConfig.from_pretrained(folder).auto_map == AUTO_MAP


def test_a_map_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"auto_map must be a dictionary .* got 'x'"):
        HopeConfig(auto_map="x")


def test_an_invalid_configuration_leaves_nothing(tmp_path):
    config = small_config(["attention"])
    config.hidden_size = 17
    with pytest.raises(ValueError, match="hidden_size"):
        config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class OwnHope(HopeForCausalLM):
    """Subclass outside of the package."""


def test_subclasses_elsewhere_are_saved_with_their_code(tmp_path):
    OwnHope.register_for_auto_class("AutoModelForCausalLM")
    try:
        OwnHope(small_config(["attention"])).save_pretrained(tmp_path)
    finally:
        OwnHope._auto_class = None
    assert (tmp_path / Path(__file__).name).is_file()
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {**AUTO_MAP, "AutoModelForCausalLM": f"{Path(__file__).stem}.OwnHope"}
