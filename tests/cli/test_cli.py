"""The commands as a user meets them: exit codes, messages, JSON alone on stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import chain, permutations
from pathlib import Path

import pytest
import torch
import transformers

import nested_learning
from nested_learning import HopeCache, HopeConfig, HopeForCausalLM, preset
from nested_learning.cli.anatomy import parts, state_bytes
from nested_learning.cli.main import COMMANDS, main
from nested_learning.cli.output import human_bytes, print_table
from nested_learning.cli.train import parse_train
from nested_learning.training.run_folder import RunFolder

MODEL = [
    "--model.hidden_size=32",
    "--model.num_hidden_layers=1",
    "--model.num_heads=2",
    "--model.cms_levels=[{'chunk_size': 16}]",
]
DATA = ["--block-size", "16", "--data.max_validation_blocks", "8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a rose is a rose is a rose, and a daisy is a daisy.\n" * 200)
    return str(path)


@pytest.fixture(scope="module")
def run_folder(text, tmp_path_factory):
    """A trained tiny Hope."""
    output = str(tmp_path_factory.mktemp("runs") / "hope")
    options = ["--data", text, "--steps", "10", "--batch_size", "4", "--lr", "1e-2", "--quiet"]
    chunks = "--model.mixer_options={'self_modifying_titans': {'chunk_size': 8}}"
    assert main(["train", *options, *MODEL, chunks, *DATA, "--output", output]) == 0
    return output


def json_of(capsys, *argv):
    """The JSON that a command prints; it is all of stdout."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv):
    """The message of a command that is refused as bad input."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err


# Help and mistakes -----------------------------------------------------------------------------------


def test_help_of_everything(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as exit_info:
            main([name, "--help"])
        assert exit_info.value.code == 0
        assert f"nested-learning {name}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == nested_learning.__version__


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["train", "--preset", "hope-tinny"], "unknown preset 'hope-tinny'. Did you mean 'hope-tiny'?"),
        (["train", "--optim.lrr", "1"], "unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        (["train", "--weight_decay", "1"], "Did you mean '--optim.weight_decay'?"),
        (
            ["train", "--model.num_head", "2"],
            "key of HopeConfig: 'num_head'. Did you mean 'num_heads'",
        ),
        (["train", "--model.hidden_size", "30"], "must be divisible by num_heads"),
        (["train", "--model.vocab_size", "30"], "the tokenizer decides it"),
        (["train", "--lr", "fast"], "optim.lr"),
        (["train", "--steps", "0"], "steps is 0"),
        (["train", "--output", ""], "output is ''; expected the path of a folder"),
        (["train", "--steps", "5", "--optim.warmup_steps", "5"], "fewer than the 5 steps"),
        (["train", "--data", "/no/such/text"], "unknown data source '/no/such/text'"),
        (["train", "--config", "/no/such.yaml"], "No such file or directory: /no/such.yaml"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["train", "--batch_size", "4", "--micro_batch_size", "3"], "Choose a divisor"),
        (["train", "--resume"], "nothing to resume"),
        (["generate"], "model"),
        (["generate", "/no/model"], "'/no/model' is not a folder"),
        (["generate", "x", "--temperature=-1"], "temperature is -1.0"),
        (["generate", "x", "--seed=-1"], "seed is -1; expected a whole number from 0"),
        (["chat", "--model", "x", "--seed", "4294967296"], "seed is 4294967296; expected"),
        (["generate", "x", "--max_new_token", "3"], "Did you mean '--max_new_tokens'?"),
        (["info", "hope-1.4b"], "Did you mean 'hope-1.3b'?"),
        (["info", "hope-tiny", "--tokens", "0"], "--tokens is [0]"),
        (["info", "transformer-tiny", "--tokens", "1000000000000"], "from 1 to 100,000,000"),
        (["levels", "hope-tiny", "--tokens_per_row", "8"], "--tokens_per_row 8 is for levels"),
        (["levels", "hope-tiny", "--mermaid", "m", "--png", "/no/where.png"], "there is no folder /no"),
        (["compare", "hope-tiny", "transformer-tiny", "--cache", __file__], "results are kept in a folder"),
        (["generate", "x", "--save_state", ""], "it is a folder"),
        (["compare", "hope-tiny"], "expected two or more"),
        (["compare", "hope-tiny", "--grid", "optim.lr"], "the part 'optim.lr'; expected KEY=VALUE"),
        (["compare", "hope-tiny", "--grid", "optim.rl=1,2"], "Did you mean 'optim.lr'"),
        (["compare", "hope-tiny", "--grid", "optim.lr=1,2", "--lr", "1"], "nothing beside a grid"),
        (["compare", "hope-tiny", "--grid", "optim.lr=1", "--tuning_seed", "0"], "one of seeds [0]"),
        (["compare", "hope-tiny", "transformer-tiny", "--budget_minutes", "1"], "there is no grid"),
        (["compare", "hope-tiny", "--grid", "optim.lr=0,1"], "optim.lr is 0"),
        (["compare", "hope-tiny", "hope-tiny"], "all different"),
        (["compare", "hope-tiny", "nope.yaml"], "nope.yaml"),
        (["compare", "hope-tiny", "transformer-tiny", "--optim.lr", "1"], "unknown option '--optim.lr'"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ZeroDivisionError("division by zero"),
            "error: ZeroDivisionError: division by zero (set NESTED_LEARN",
        ),
        (KeyError(), "error: KeyError (set NESTED_LEARNING_DEBUG=1 to see where)"),
        (ValueError(), "error: ValueError (set NESTED_LEARNING_DEBUG=1 to see where)"),
        (MemoryError(), "error: this needs more memory than there is"),
        (RecursionError("maximum"), "error: a value is nested too deeply"),
    ],
)
def test_unexpected_errors_are_told_and_traced_on_demand(monkeypatch, capsys, error, message):
    def fails(*args):
        raise error

    monkeypatch.setattr("nested_learning.cli.info.info", fails)
    assert message in refused(capsys, "info", "hope-tiny")
    monkeypatch.setenv("NESTED_LEARNING_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["info", "hope-tiny"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), BrokenPipeError()])
def test_interrupts_exits_and_pipes_pass_the_door(monkeypatch, error):
    def fails(*args):
        raise error

    monkeypatch.setattr("nested_learning.cli.info.info", fails)
    monkeypatch.setattr("nested_learning.cli.main._close_stdout", lambda: None)
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            main(["info", "hope-tiny"])
        return
    assert main(["info", "hope-tiny"]) == (130 if isinstance(error, KeyboardInterrupt) else 0)


def test_yaml_and_flags_make_one_configuration(text, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"preset: transformer-tiny\nsteps: 3\nbatch_size: 2\ndata: {{source: {text}}}\n")
    output = str(tmp_path / "run")
    flags = ["--config", str(path), "--output", output, "--quiet", "--steps", "2", "--sample_tokens", "0"]
    config = json_of(capsys, "train", *flags, *MODEL, *DATA)["config"]
    assert (config["preset"], config["steps"], config["batch_size"]) == ("transformer-tiny", 2, 2)
    assert config["model"]["cms_levels"] == [{"chunk_size": 16}]
    assert "already holds a run" in refused(capsys, "train", *flags, *MODEL, *DATA)
    path.write_text("optim: {weigth_decay: 1}\n")
    assert "Did you mean 'optim.weight_decay'?" in refused(capsys, "train", "--config", str(path))


FLAGS = (["--steps", "2"], ["--optim.lr=0.5"], ["--config", "run.yaml"])


@pytest.mark.parametrize("argv", list(permutations(FLAGS)))
def test_a_flag_counts_on_either_side_of_a_file(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("steps: 3\nbatch_size: 2\noptim: {lr: 1.0, weight_decay: 0.3}\n")
    config, _ = parse_train([*chain(*argv)])
    assert (config.steps, config.batch_size, config.optim.lr, config.optim.weight_decay) == (2, 2, 0.5, 0.3)


@pytest.mark.parametrize("turned", [1, -1])
def test_a_flag_counts_on_either_side_of_its_group(turned):
    argv = ["--model.num_heads=2", '--model={"hidden_size": 32, "num_heads": 4}']
    assert parse_train(argv[::turned])[0].model == {"hidden_size": 32, "num_heads": 2}
    optim = parse_train(["--optim.lr=0.5", '--optim={"lr": 1.0, "weight_decay": 0.3}'][::turned])[0].optim
    assert (optim.lr, optim.weight_decay) == (0.5, 0.3)


# train -----------------------------------------------------------------------------------------------


def test_train_prints_what_the_file_says(run_folder, capsys, text, tmp_path):
    saved = json.loads(RunFolder(run_folder).result.read_text())
    argv = ["--data", text, "--steps", "3", "--batch_size", "4", *MODEL, *DATA, "--quiet"]
    assert main(["train", *argv, "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for value in (result["validation"]["before"], result["validation"]["after"]):
        assert f"{value['bits_per_byte']:.3f}" in shown
    assert result["files"]["model"] in shown
    assert f"nested-learning generate {result['files']['model']}" in shown
    assert result["sample"]["text"] in shown
    assert saved["validation"]["after"]["bits_per_byte"] < saved["validation"]["before"]["bits_per_byte"]


def test_diverged_training_is_exit_code_1(text, tmp_path, capsys):
    argv = ["--data", text, "--steps", "6", "--lr", "1e30", "--optim.max_grad_norm", "0", *MODEL, *DATA]
    rest = ["--optim.warmup_steps", "0", "--quiet", "--batch_size", "2", "--output", str(tmp_path / "run")]
    assert main(["train", *argv, *rest]) == 1
    assert "of step" in capsys.readouterr().err


def test_sigterm_saves_and_resume_goes_on(text, tmp_path, capsys, request):
    """A real process, a real signal, then the losses of a run that was never interrupted."""
    steps = ["--data", text, "--steps", "100", "--batch_size", "2", "--sample_tokens", "0", *MODEL, *DATA]
    shared = [*steps, "--preset", "transformer-tiny", "--quiet", "--eval_every", "50"]
    output = tmp_path / "run"
    command = [sys.executable, "-m", "nested_learning", "train", *shared, "--output", str(output)]
    process = subprocess.Popen([*command, "--save_every", "10"], stderr=subprocess.PIPE, text=True)
    request.addfinalizer(process.kill)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/checkpoint-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"python -m nested_learning train --output {output} --resume" in message
    assert not (output / "result.json").exists()

    resumed = json_of(capsys, "train", "--output", str(output), "--resume", "--quiet")
    whole = json_of(capsys, "train", *shared, "--output", str(tmp_path / "whole"))
    assert resumed["losses"]["train"] == whole["losses"]["train"]
    assert resumed["step_seconds"]["measured"] < 100


# generate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a rose", ""])
def test_saved_state_goes_on_as_if_never_stopped(run_folder, capsys, tmp_path, prompt):
    state = str(tmp_path / "talk.safetensors")
    greedy = ["generate", run_folder, "--temperature", "0", "--max_new_tokens"]
    save, load = ["--save-state", state], ["--load-state", state]
    whole = json_of(capsys, *greedy, "40", "--prompt", prompt)
    first = json_of(capsys, *greedy, "13", "--prompt", prompt, *save)
    rest = json_of(capsys, *greedy, "27", *load, *save)
    assert first["text"] + rest["text"] == whole["text"]
    assert rest["tokens_seen"] == whole["tokens_seen"]
    assert rest["state_bytes"] == whole["state_bytes"] == first["state_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]


def test_a_later_prompt_is_read_after_the_whole_text(run_folder, capsys, tmp_path):
    state = str(tmp_path / "talk.safetensors")
    greedy = ["generate", run_folder, "--temperature", "0", "--max_new_tokens", "9", "--prompt"]
    first = json_of(capsys, *greedy, "a rose", "--save-state", state)
    later = json_of(capsys, *greedy, " a daisy", "--load-state", state)
    whole = json_of(capsys, *greedy, "a rose" + first["text"] + " a daisy")
    assert later["text"] == whole["text"]


def test_sampling_follows_the_seed_and_streams(run_folder, capsys):
    argv = ["generate", run_folder, "--prompt", "a ", "--max_new_tokens", "30", "--temperature", "1.5"]
    one, again, other = (json_of(capsys, *argv, "--seed", seed)["text"] for seed in "001")
    assert one == again != other
    assert main([*argv, "--seed", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a " + one.rstrip("\n")[:20])
    assert "tokens" in err


def test_the_coldest_text_is_the_likeliest(run_folder, capsys):
    argv = ["generate", run_folder, "--prompt", "a ", "--max_new_tokens", "9", "--temperature"]
    assert json_of(capsys, *argv, "1e-40")["text"] == json_of(capsys, *argv, "0")["text"]


def test_without_a_compiler_generate_warns_once_and_answers(run_folder, capsys, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    argv = ["generate", run_folder, "--prompt", "a ", "--max_new_tokens", "9"]
    plain = json_of(capsys, *argv)
    torch.compiler.reset()
    monkeypatch.setattr("transformers.CompileConfig", partial(transformers.CompileConfig, backend=backend))
    with pytest.warns(RuntimeWarning, match="no compiler here") as warned:
        assert json_of(capsys, *argv, "--compile")["text"] == plain["text"]
    assert len([w for w in warned if "no compiler here" in str(w.message)]) == 1


def test_foreign_and_damaged_files_are_refused(run_folder, capsys, tmp_path):
    state = tmp_path / "talk.safetensors"
    json_of(capsys, "generate", run_folder, "--max_new_tokens", "3", "--save-state", str(state))
    other = HopeForCausalLM(HopeConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, num_heads=2))
    other.save_pretrained(tmp_path / "other")
    assert "tokenizer" in refused(capsys, "generate", str(tmp_path / "other"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((RunFolder(run_folder).model / name).read_bytes())
    load = ["--load-state", str(state)]
    assert "another configuration" in refused(capsys, "generate", str(tmp_path / "other"), *load)
    state.write_bytes(state.read_bytes()[:500])
    assert "truncated" in refused(capsys, "generate", run_folder, *load)
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(capsys, "generate", str(tmp_path / "other"))
    assert "no cache file" in refused(capsys, "generate", run_folder, "--load-state", str(tmp_path / "no"))
    full = ["--save-state", "/proc/nothing/state", "--max_new_tokens", "2", "--json"]
    assert "/proc/nothing" in refused(capsys, "generate", run_folder, *full)


# info ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        preset("hope-tiny", num_hidden_layers=2),
        preset("hope-tiny", num_hidden_layers=2, mixer=["attention", "self_modifying_titans"]),
        preset("transformer-tiny", mixer_options={"attention": {"num_kv_heads": 2}}),
        preset("transformer-tiny", cms_levels=[{"chunk_size": 4}, {"chunk_size": 8}], cms_update="lm"),
    ],
)
def test_info_measures_what_a_real_model_holds(config):
    model = HopeForCausalLM(config).eval()
    assert sum(part.parameters for part in parts(config)) == model.num_parameters()
    expected = state_bytes(config, [1, 5, 40])
    for tokens, nbytes in expected.items():
        cache = HopeCache(config)
        with torch.no_grad():
            model(torch.zeros(3, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert cache.nbytes() == 3 * nbytes


def test_info_of_presets_yaml_and_runs(run_folder, capsys):
    big = json_of(capsys, "info", "hope-1.3b", "--batch", "1", "4", "--tokens", "64", "128")
    assert big["parameters"] == pytest.approx(1.3e9, rel=0.05)
    assert sum(part["parameters"] for part in big["parts"]) == big["parameters"]
    assert {part["part"] for part in big["parts"]} >= {"CMS level 1 (chunk 512)", "CMS level 2 (chunk 2048)"}
    sizes = {(entry["batch"], entry["tokens"]): entry["bytes"] for entry in big["state"]}
    assert sizes[4, 64] == 4 * sizes[1, 64] == 4 * sizes[1, 128]
    saved = json.loads(RunFolder(run_folder).result.read_text())
    of_run, of_yaml = (
        json_of(capsys, "info", str(name)) for name in (run_folder, RunFolder(run_folder).config)
    )
    assert of_run["parameters"] == of_yaml["parameters"] == saved["parameters"]
    assert of_run["state"] == of_yaml["state"]


# compare ---------------------------------------------------------------------------------------------


def test_compare_prints_json_and_a_table(text, capsys):
    argv = ["compare", "hope-tiny", "transformer-tiny", "--data", text, "--steps", "2", "--batch_size", "2"]
    argv += ["--validation_batches", "1", "--quiet", "--no-memory", "--lr", "3e-3", "1e-2", "--seeds", "0"]
    result = json_of(capsys, *argv, "--block_size", "8")
    assert result["config"]["optim"]["schedule"] == "linear"
    assert result["config"]["lrs"] == [3e-3, 1e-2]
    hope, transformer = result["models"]
    assert (hope["model"], transformer["model"]) == ("hope-tiny", "transformer-tiny")
    speed = hope["relative_speed"] * transformer["tokens_per_second"]
    assert speed == pytest.approx(hope["tokens_per_second"])
    assert hope["bits_per_byte"] > hope["nats_per_token"] > 0  # a token is about a byte
    assert main([*argv, "--block_size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["model", "parameters", "best", "lr"]
    assert lines[2].split()[:2] == ["hope-tiny", f"{hope['parameters']:,}"]


def test_a_search_prints_every_setting(text, capsys):
    argv = ["compare", "transformer-tiny", "--data", text, "--steps", "2", "--batch_size", "2", "--quiet"]
    argv += ["--validation_batches", "1", "--no-memory", "--block_size", "8", "--seeds", "0"]
    argv += ["--grid", "optim.lr=3e-3,1e-2;optim.betas=[0.9,0.95]"]
    result = json_of(capsys, *argv)
    (model,) = result["models"]
    assert [each["setting"]["optim.lr"] for each in model["settings"]] == [3e-3, 1e-2]
    assert sum(each["chosen"] for each in model["settings"]) == 1
    assert model["best_lr"] == model["setting"]["optim.lr"]
    assert result["search"]["seed"] == 1000
    assert main([*argv, "--budget_minutes", "1e-9"]) == 0
    table = capsys.readouterr().out.split("every setting, at seed 1000 (* chosen)")[1].splitlines()
    assert table[1].split() == ["model", "lr", "betas", "nats/token"]
    assert {line.split()[-1][-1] for line in table[2:4]} == {"*", "t"}  # one was chosen, one cut
    assert table[4] == "cut by the budget of 1e-09 minutes: 1 settings, seeds: none"


# Output ----------------------------------------------------------------------------------------------


def test_plain_table_lines_up(capsys):
    print_table("title", ("name", "n"), [("a", 1), ("long name", 1000)])
    assert capsys.readouterr().out == "title\nname          n\na             1\nlong name  1000\n"


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5120.0 GiB",
    ]  # fmt: skip


@pytest.fixture
def unread():
    """A pipe to write to whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_a_closed_pipe_is_no_error(unread, monkeypatch):
    with os.fdopen(os.dup(unread), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info", "hope-tiny", "--json"]) == 0


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["info", "--help"]], ids=" ".join)
def test_a_closed_pipe_is_no_error_of_a_process(unread, argv):
    """Nor one that Python tells of as it ends."""
    command = [sys.executable, "-m", "nested_learning", *argv]
    done = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Files --------------------------------------------------------------------------------------------------


def test_no_command_writes_over_what_is_no_file(capsys, run_folder, tmp_path):
    """A pipe of our own stands for a device. It is refused before a long text is written."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        path = str(tmp_path / name)
        for argv in (
            ["generate", run_folder, "--prompt", "a", "--save_state", path],
            ["levels", "hope-tiny", "--mermaid", path],
            ["levels", "hope-tiny", "--png", path],
        ):
            assert "it is a pipe; give the name of a regular file" in refused(capsys, *argv)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_session_is_written_through_a_link_and_keeps_its_mode(capsys, run_folder, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("target")
    argv = ["generate", run_folder, "--prompt", "a", "--max_new_tokens", "3"]
    json_of(capsys, *argv, "--save_state", str(link))
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    json_of(capsys, *argv, "--load_state", str(target))
    content = bytearray(target.read_bytes())
    content[-5] ^= 1
    target.write_bytes(content)
    assert "is damaged" in refused(capsys, *argv, "--load_state", str(target), "--json")
