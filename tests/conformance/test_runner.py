"""The runner of transformers' tests, without transformers' tests."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conformance import __main__ as runner
from tests.conformance.layout import ELSEWHERE, lay_out
from tests.conformance.report import NOT_RUN, read_results, render
from tests.conformance.table import CONFIGURATIONS, NOT_APPLICABLE, OUTDATED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {
            "tests/test_modeling_common.py": "class ModelTesterMixin:\n    pass\n",
            "tests/test_pipeline_mixin.py": "class PipelineTesterMixin:\n    pass\n",
            "tests/test_training_mixin.py": "class TrainingTesterMixin:\n    pass\n",
            "src/transformers/x.py": "raise RuntimeError\n",
            "setup.py": "raise RuntimeError\n",
        }.items():
            member = tarfile.TarInfo(f"transformers-0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def run(suite: Path, line: str) -> str:
    command = [sys.executable, "-c", line]
    return subprocess.run(command, cwd=suite, capture_output=True, text=True, check=True).stdout


def test_a_layout_without_a_checkout_can_be_imported_and_says_what_is_missing(archive, tmp_path):
    suite = tmp_path / "suite"
    missing = lay_out(archive, None, suite)
    assert missing == {name: count for name, (count, _) in ELSEWHERE.items()}
    assert (
        run(suite, "from tests.causal_lm_tester import CausalLMModelTest as C; print(len(C.__mro__))")
        == "6\n"
    )
    assert not (suite / "setup.py").exists()
    assert (
        (suite / "tests/models/hope/test_modeling_hope.py").read_text().startswith('"""Test classes for Hope')
    )


def test_files_of_a_checkout_take_the_places(archive, tmp_path):
    """Names that the installed transformers does not have are left out, what else a file needs is not."""
    checkout = tmp_path / "checkout"
    (checkout / "tests/generation").mkdir(parents=True)
    (checkout / "tests/utils").mkdir()
    (checkout / "tests/generation/test_utils.py").write_text(
        "from transformers.generation import GenerationConfig, no_such_thing\n\n\n"
        "@no_such_thing\nclass GenerationTesterMixin:\n    base = GenerationConfig.__name__\n"
    )
    (checkout / "tests/utils/test_configuration_utils.py").write_text(
        "import no_such_module\n\nconfig_common_kwargs = {'a': 1}\n"
    )
    suite = tmp_path / "suite"
    missing = lay_out(archive, checkout, suite)
    assert "tests/generation/test_utils.py" not in missing
    module: dict = {}
    exec((suite / "tests/generation/test_utils.py").read_text(), module)
    assert module["GenerationTesterMixin"].base == "GenerationConfig"
    exec((suite / "tests/utils/test_configuration_utils.py").read_text(), module)
    assert module["config_common_kwargs"] == {"a": 1}
    (checkout / "tests/utils/test_configuration_utils.py").write_text("other = 1\n")
    with pytest.raises(ValueError, match="is it a checkout of transformers"):
        lay_out(archive, checkout, suite)


def results(tmp_path, configuration: str, cases: str) -> Path:
    path = tmp_path / f"{configuration}.xml"
    cases = cases.replace("<case ", f'<testcase classname="tests.models.hope.Hope_{configuration}" ')
    path.write_text(
        f"<testsuites><testsuite>{cases.replace('</case>', '</testcase>')}</testsuite></testsuites>"
    )
    return path


def test_the_report_counts_each_test_once_and_says_why_others_did_not_run(tmp_path):
    old = next(iter(OUTDATED))
    first = results(
        tmp_path,
        "titans",
        '<case name="test_a"/><case name="test_b"><failure message="ValueError: wrong&#10;more"/></case>'
        '<case name="test_b"/><case name="test_b"><skipped message="one of three"/></case>'
        '<case name="test_c_0_x"><skipped message="not applicable: no heads"/></case>'
        '<case name="test_c_1_y"><skipped message="not applicable: no heads"/></case>'
        f'<case name="test_d"><failure message="TypeError: {old}"/></case>'
        f'<case name="test_e"><skipped message="{NOT_RUN}"/></case>'
        '<case name="test_f"><skipped message="Hope_titans::test_f is skipped: `x-y` is not there"/></case>',
    )
    second = results(
        tmp_path,
        "mac",
        '<case name="test_a"/><case name="test_f"><skipped message="test requires Timm"/></case>'
        '<case name="test_b"><error message="broken"/></case>',
    )
    found = read_results([first, second])
    assert dict(found.passed) == {"titans": 1, "mac": 1}
    assert found.failed == [("titans", "test_b", "ValueError: wrong"), ("mac", "test_b", "broken")]
    assert dict(found.not_applicable) == {("test_c", "no heads"): 2}
    assert {why: dict(tests) for why, tests in found.skipped.items()} == {
        "the task is not there": {"test_f": 1},
        "test requires Timm": {"test_f": 1},
    }
    assert list(found.outdated.values()) == [1]
    text = render(found, {"tests/generation/test_utils.py": 90})
    assert "  titans: test_b: ValueError: wrong" in text
    assert "  2 × test_c: no heads" in text
    assert "  90 in tests/generation/test_utils.py" in text
    last = text.splitlines()[-1]
    assert last == (
        "2 passed, 2 failed, 2 not applicable, 2 skipped by transformers, 91 not run (files missing or of "
        "another version)"
    )


def test_the_exit_code_follows_the_tests(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "fetch_archive", lambda *_: archive)
    monkeypatch.setattr(runner, "fetch_packages", lambda *_: tmp_path)
    cases = {"titans": '<case name="test_a"/>', "mac": '<case name="test_a"><failure message="no"/></case>'}
    monkeypatch.setattr(runner, "run", lambda _, __, name, ___: results(tmp_path, name, cases[name]))
    call = ["conformance", "--cache", str(tmp_path / "cache"), "--only"]
    for names, code in ((["titans"], 0), (["titans", "mac"], 1)):
        monkeypatch.setattr(sys, "argv", [*call, *names])
        assert runner.main() == code
        assert "not run, because files of transformers' repository are missing" in capsys.readouterr().out
    monkeypatch.setattr(runner, "run", lambda *_: tmp_path / "nothing.xml")
    assert runner.main() == 2
    monkeypatch.setattr(sys, "argv", [*call, "titans", "--transformers", str(tmp_path / "nowhere")])
    assert runner.main() == 2
    assert "has no folder tests" in capsys.readouterr().err


def test_the_table_is_about_configurations_that_exist():
    from nested_learning import HopeConfig

    for fields in CONFIGURATIONS.values():
        HopeConfig(hidden_size=32, num_heads=2, num_hidden_layers=2, **fields)
    assert set(NOT_APPLICABLE) <= set(CONFIGURATIONS)
    for reasons in NOT_APPLICABLE.values():
        assert all(name.startswith("test_") and reason for name, reason in reasons.items())
