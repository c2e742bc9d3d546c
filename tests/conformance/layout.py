"""The folder that transformers' tests run in: its files, and what stands in for those that are missing."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

from tests.conformance.report import NOT_RUN

HERE = Path(__file__).parent
# What the tests import and this project does not.
PACKAGES = ["parameterized==0.9.0"]

_SKIP = f"import unittest\n\nraise unittest.SkipTest({NOT_RUN!r})\n"
# Files that the archive does not have, each with the number of tests that one configuration loses without it
# (transformers 5.23) and the lines that let the other files be imported without it.
ELSEWHERE = {
    "tests/generation/test_utils.py": (44, "class GenerationTesterMixin:\n    pass\n"),
    "tests/causal_lm_tester.py": (
        13,
        "from .generation.test_utils import GenerationTesterMixin\n"
        "from .test_modeling_common import ModelTesterMixin\n"
        "from .test_pipeline_mixin import PipelineTesterMixin\n"
        "from .test_training_mixin import TrainingTesterMixin\n\n\n"
        "class CausalLMModelTest(\n"
        "    ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, TrainingTesterMixin\n"
        "):\n    pass\n",
    ),
    "tests/exporters/test_export.py": (7, "class ExportTesterMixin:\n    pass\n"),
    "tests/utils/test_configuration_utils.py": (0, "config_common_kwargs = {}\n"),
    "tests/utils/tiny_model_summary.json": (0, "{}"),  # of models on the hub: Hope's tests make their own
    "tests/pipelines/test_pipelines_common.py": (0, ""),
    **{
        f"tests/pipelines/test_pipelines_{task}.py": (2, _SKIP)
        for task in (
            "feature_extraction",
            "text_classification",
            "text_generation",
            "token_classification",
            "zero_shot",
        )
    },
}
# Files of which the tests need one thing only, and which import more than there is.
ONE_THING = {
    "tests/utils/test_configuration_utils.py": "config_common_kwargs",
    "tests/pipelines/test_pipelines_common.py": "ANY",
}


def fetch_archive(version: str, cache: Path) -> Path:
    """The source archive of transformers, downloaded by pip unless the cache has it."""
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.exists():
        _pip(
            "download", "--no-deps", "--no-binary", ":all:", "--dest", str(cache), f"transformers=={version}"
        )
    return archive


def fetch_packages(cache: Path) -> Path:
    """A folder with `PACKAGES`, installed there unless they are in it."""
    folder = cache / "packages"
    if not folder.exists():
        _pip("install", "--no-deps", "--target", str(folder), *PACKAGES)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def lay_out(archive: Path, elsewhere: Path | None, suite: Path) -> dict[str, int]:
    """Fill the folder `suite`, anew, with transformers' tests and Hope's test classes.

    Args:
        archive: source archive of transformers.
        elsewhere: a checkout of transformers, or a folder with the files of `ELSEWHERE` at their places;
            None: there is none.
        suite: the folder.

    Returns:
        The files that are missing, each with the number of tests per configuration that are not run for it.
    """
    shutil.rmtree(suite, ignore_errors=True)
    suite.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = Path(*Path(member.name).parts[1:])
            if member.isfile() and inside.parent == Path("tests") and inside.suffix == ".py":
                source = tar.extractfile(member)
                assert source is not None
                _write(suite / inside, source.read())
    missing = {}
    for name, (count, stand_in) in ELSEWHERE.items():
        found = None if elsewhere is None else elsewhere / name
        if found is not None and found.is_file():
            text = found.read_text(encoding="utf-8")
            if name in ONE_THING:
                text = _one_thing(text, ONE_THING[name])
            elif found.suffix == ".py":
                text = _without_absent(text)
            _write(suite / name, text.encode())
        else:
            missing[name] = count
            _write(suite / name, stand_in.encode())
    # The tests read some files of the package from where a checkout has them.
    (suite / "src").mkdir()
    (suite / "src/transformers").symlink_to(Path(transformers.__file__).parent)
    for name, target in (("suite.py", "test_modeling_hope.py"), ("table.py", "table.py")):
        _write(suite / "tests/models/hope" / target, (HERE / name).read_bytes())
    for folder in {path.parent for path in suite.glob("tests/**/*.py")} | {suite / "tests/models"}:
        (folder / "__init__.py").touch()
    return missing


def _without_absent(text: str) -> str:
    """A module of another version, whose imports of names that the installed transformers lacks are left out.

    In their place stands a class that gives back what it is called with, as a decorator may.
    """
    tree, absent = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            module = importlib.import_module(node.module or "")
            gone = [alias for alias in node.names if not hasattr(module, alias.name)]
            absent += [alias.asname or alias.name for alias in gone]
            node.names = [a for a in node.names if a not in gone] or [ast.alias("__name__", "_")]
    if not absent:
        return text
    stand_in = (
        "class _Absent:\n    def __new__(cls, given=None, *others, **named):\n        return given\n\n\n"
    )
    return stand_in + "".join(f"{name} = _Absent\n" for name in absent) + ast.unparse(tree)


def _one_thing(text: str, name: str) -> str:
    """The lines of a module that define `name`."""
    for node in ast.parse(text).body:
        names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
        if name in names or (isinstance(node, ast.ClassDef) and node.name == name):
            return ast.unparse(node) + "\n"
    raise ValueError(f"no {name} in the file that was given for it: is it a checkout of transformers?")


def _write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
