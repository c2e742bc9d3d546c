"""What starting costs: which modules are imported when, and that transformers finds Hope in either order."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nested_learning
from nested_learning.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "accelerate", "datasets", "tokenizers", "matplotlib")
LAZY = ("nested_learning", "nested_learning.training.data")
ROOT = Path(nested_learning.__file__).parent.parent


def python(code: str, *argv: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WHAT_IS_IMPORTED = f"""
import contextlib, io, json, sys
import nested_learning
seen = {{"the package": [m for m in {HEAVY} if m in sys.modules]}}
from nested_learning.cli.main import main
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(line)
        except SystemExit as error:
            code = error.code
    seen[" ".join(line) + f" -> {{code}}"] = [m for m in {HEAVY} if m in sys.modules]
print(json.dumps(seen))
"""


def test_help_and_mistakes_import_nothing_heavy():
    right = [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    wrong = [["trian"], *([name, "x", "--no_such_flag", "3"] for name in COMMANDS)]
    wrong += [["train", "--steps", "many"], ["train", "--lr", "-1"], ["chat", "--model", "x", "--top_p", "2"]]
    wrong += [["train", "--data.documents", "joint"], ["generate"], ["train", "--config", "/no/such.yaml"]]
    seen = json.loads(python(WHAT_IS_IMPORTED, json.dumps([*right, *wrong])))
    assert len(seen) == 1 + len(right) + len(wrong)
    assert {line: modules for line, modules in seen.items() if modules} == {}
    codes = [line.rpartition(" -> ")[2] for line in seen if " -> " in line]
    assert codes == ["0"] * len(right) + ["2"] * len(wrong)


# The names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_found_and_listed(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Hoppe'"):
        _ = module.Hoppe


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_same_names_from_the_same_modules(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    for name, where in told.items():
        assert getattr(module, name) is getattr(importlib.import_module(where), name)
    assert set(module.__all__) - {"__version__"} == set(told)


def test_names_come_on_first_use_also_by_star_by_folder_and_from_a_pickle():
    python("""
import copy, pickle, sys
import nested_learning
assert "torch" not in sys.modules
assert nested_learning.optimizers.M3.__name__ == "M3"
assert nested_learning.layers.Titans is nested_learning.Titans
names = {}
exec("from nested_learning import *", names)
assert set(nested_learning.__all__) <= set(names)
config = names["HopeConfig"](hidden_size=16, num_heads=2)
assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
assert type(copy.deepcopy(config)) is nested_learning.HopeConfig
from nested_learning import levels
assert levels.levels
from nested_learning.training.data.build import DataConfig
from nested_learning.training.adapt import AdaptConfig
from nested_learning.training.config import require
assert pickle.loads(pickle.dumps(DataConfig(block_size=9))).block_size == 9
""")


# transformers' Auto classes -----------------------------------------------------------------------------

TELL = """
config = AutoConfig.for_model('hope', hidden_size=16, num_heads=2, num_hidden_layers=1, vocab_size=9)
print(config.model_type, AutoModelForCausalLM.from_config(config).__module__)
"""
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"


# transformers loads the Auto classes in the middle of these modules, from which Hope's classes derive.
IN_THE_MIDDLE = "from transformers.modeling_layers import GradientCheckpointingLayer"
LATER = [
    ["import nested_learning", AUTO],
    ["import transformers, nested_learning", AUTO],
    ["import nested_learning", "from transformers import LlamaForCausalLM, Trainer", AUTO],
    ["import nested_learning", "from transformers import pipeline", AUTO],
    ["import nested_learning", "nested_learning.HopeModel", AUTO],
    ["import nested_learning", "from nested_learning.models.hope.block_hope import HopeBlock", AUTO],
    ["import nested_learning.layers, nested_learning.levels, nested_learning.continual", AUTO],
]


@pytest.mark.parametrize(
    "lines",
    [
        [AUTO, "import nested_learning"],
        ["import nested_learning", IN_THE_MIDDLE, AUTO],
        *(pytest.param(lines, marks=pytest.mark.slow) for lines in LATER),
    ],
)
def test_transformers_knows_hope_in_either_order(lines):
    hook = (
        "import sys, nested_learning._auto_classes as a, transformers.models.auto.modeling_auto as m\n"
        "assert not any(isinstance(f, a.AutoClassesFinder) for f in sys.meta_path), 'the finder stays'\n"
        "assert type(m.__loader__).__name__ == type(m.__spec__.loader).__name__ == 'SourceFileLoader'"
    )
    code = "\n".join([*lines, TELL, hook])
    assert python(code).split() == ["hope", "nested_learning.models.hope.modeling_hope"]


@pytest.mark.slow
def test_hope_is_loaded_with_the_auto_classes_and_not_before():
    python("""
import sys
import nested_learning, transformers
assert "nested_learning.models.hope" not in sys.modules
from transformers import PreTrainedTokenizerFast, AutoConfig
assert "nested_learning.models.hope" in sys.modules
assert "hope" in AutoConfig.for_model("hope").model_type
""")


@pytest.mark.slow
def test_a_failing_import_is_counted_back():
    """After an import that fails, the next one is the outermost again."""
    python("""
import sys
import nested_learning
sys.modules["transformers.models.auto.auto_factory"] = None
try:
    import transformers.models.auto.modeling_auto
except ImportError:
    pass
else:
    raise AssertionError
del sys.modules["transformers.models.auto.auto_factory"]
from transformers import AutoConfig
AutoConfig.for_model("hope")
""")
