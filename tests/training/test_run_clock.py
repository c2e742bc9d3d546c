"""Runs with `max_minutes`, on a clock that the test turns on: the time holds, the schedule ends properly."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments

from nested_learning.training import results, timing
from nested_learning.training import run as run_module
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import dump_config, load_config
from nested_learning.training.data import build_data
from nested_learning.training.optim import lr_factor
from nested_learning.training.run import train
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.timing import RunClock
from nested_learning.training.trainer import HopeTrainer


class Machine:
    """A clock on which steps, evaluations, checkpoints and samples take the seconds that the test says."""

    def __init__(self):
        self.time = self.began = 1000.0
        self.taken = 0
        self.step = lambda number: 1.0
        self.evaluation, self.checkpoint, self.sample = 5.0, 1.0, 2.0

    def take_step(self):
        self.time += self.step(self.taken)
        self.taken += 1

    @property
    def seconds(self):
        return self.time - self.began


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing.time, "monotonic", lambda: machine.time)
    return machine


class Run:
    """A run as the Trainer makes it, without a model: its learning rates, evaluations and checkpoints."""

    def __init__(self, config, machine):
        clock = RunClock(config)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = timing.ClockSchedule(optimizer, clock)
        bounded = config.with_steps(1000)
        args = TrainingArguments(
            "unused",
            max_steps=1000,
            eval_strategy="steps",
            eval_steps=bounded.eval_every,
            save_strategy="steps",
            save_steps=bounded.save_every,
        )
        state, control, flow = TrainerState(max_steps=1000), TrainerControl(), DefaultFlowCallback()
        state.compute_steps(args, 1000)
        self.rates, self.evaluated, self.saved = [], [0], []
        clock.took("sample", machine.sample)
        clock.on_train_begin()
        machine.time += machine.evaluation
        clock.on_evaluate()
        while not control.should_training_stop:
            control.should_evaluate = control.should_save = False
            clock.on_step_begin(args, state, control, lr_scheduler=schedule)
            machine.take_step()
            self.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            state.global_step += 1
            control = clock.on_step_end(args, state, flow.on_step_end(args, state, control))
            if control.should_evaluate:
                machine.time += machine.evaluation
                self.evaluated.append(state.global_step)
                clock.on_evaluate()
            if control.should_save:
                machine.time += machine.checkpoint
                self.saved.append(state.global_step)
                clock.on_save()
        machine.time += machine.sample
        self.steps = state.global_step


@pytest.mark.parametrize(
    ("step", "steps"),
    [
        (lambda n: 1.0, (120, 170)),
        (lambda n: 1.0 if n < 10 else 92.0, (11, 12)),  # measured at 1 s, then 92 times as long
        (lambda n: 1.0 if n < 60 else 30.0, (61, 65)),
        (lambda n: 20.0 if n < 3 else 0.5, (150, 250)),  # a busy machine becomes quiet
        (lambda n: 60.0 if n == 40 else 1.0, (70, 110)),  # one spike
        (lambda n: 1.0 + n % 7, (30, 60)),
        (lambda n: 400.0, (1, 1)),
    ],
    ids=["even", "92 times", "later", "faster", "spike", "uneven", "one step"],
)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_time_holds_and_the_schedule_ends(tiny, machine, step, steps, schedule):
    machine.step = step
    run = Run(tiny(steps=None, max_minutes=3.0, optim=OptimConfig(schedule=schedule)), machine)
    assert steps[0] <= run.steps <= steps[1]
    allowed = max(18.0, step(run.steps - 1) + machine.evaluation)
    assert abs(machine.seconds - 180) <= allowed or run.steps == 1
    assert max(run.rates) <= 1
    if run.steps > 1:
        assert run.rates[-1] == pytest.approx(0.1, abs=0.02)
    assert run.evaluated[-1] == run.saved[-1] == run.steps


def test_an_even_machine_has_the_schedule_of_a_fixed_run(tiny, machine):
    run = Run(tiny(steps=None, max_minutes=3.0, optim=OptimConfig(warmup_steps=20)), machine)
    assert run.rates[:20] == pytest.approx([(n + 1) / 20 for n in range(20)])
    factor = lr_factor(OptimConfig(warmup_steps=20), run.steps)
    assert run.rates == pytest.approx([factor(n) for n in range(run.steps)], abs=0.06)
    assert (len(run.evaluated), len(run.saved)) == (6, 4)


def test_dear_evaluations_are_left_out_and_those_asked_for_are_made(tiny, machine):
    machine.evaluation = 40.0
    run = Run(tiny(steps=None, max_minutes=3.0), machine)
    assert run.evaluated == [0, run.steps]
    assert abs(machine.seconds - 180) <= 18
    machine.began = machine.time
    run = Run(tiny(steps=None, max_minutes=3.0, eval_every=10), machine)
    assert run.evaluated == list(range(0, run.steps + 1, 10))
    assert abs(machine.seconds - 180) <= 41
    assert run.rates[-1] == pytest.approx(0.1, abs=0.02)


def test_what_comes_after_the_last_step_becomes_dearer_with_the_steps(tiny, machine):
    machine.evaluation = 2.0

    def step(number):
        if number == 40:
            machine.evaluation, machine.sample = 20.0, 20.0
        return 1.0 if number < 40 else 10.0

    machine.step = step
    Run(tiny(steps=None, max_minutes=5.0), machine)
    assert abs(machine.seconds - 300) <= 30


def test_a_warm_up_longer_than_the_run_ends_by_half_of_it(tiny, machine):
    run = Run(tiny(steps=None, max_minutes=1.0, optim=OptimConfig(warmup_steps=1000)), machine)
    top = run.rates.index(max(run.rates))
    assert max(run.rates) == pytest.approx(1, abs=0.05)
    assert 0.4 < top / run.steps < 0.6
    assert run.rates == sorted(run.rates[: top + 1]) + sorted(run.rates[top + 1 :], reverse=True)


@pytest.fixture
def trainer(machine, monkeypatch):
    """The machine, on which real runs take their seconds."""
    step, evaluate, save = HopeTrainer.training_step, HopeTrainer.evaluate, HopeTrainer._save_checkpoint

    def slow_step(trainer, *args, **kwargs):
        machine.take_step()
        return step(trainer, *args, **kwargs)

    def slow_evaluate(trainer, *args, **kwargs):
        machine.time += machine.evaluation
        return evaluate(trainer, *args, **kwargs)

    def slow_save(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        machine.time += machine.checkpoint

    def slow_sample(*args):
        machine.time += machine.sample
        return {"prompt": "", "text": ""}

    monkeypatch.setattr(HopeTrainer, "training_step", slow_step)
    monkeypatch.setattr(HopeTrainer, "evaluate", slow_evaluate)
    monkeypatch.setattr(HopeTrainer, "_save_checkpoint", slow_save)
    monkeypatch.setattr(results, "_sample", slow_sample)
    monkeypatch.setattr(results.time, "perf_counter", lambda: machine.time)
    return machine


def rates(config):
    """The learning rate of each step as a fraction of the peak."""
    last = RunFolder(config.output).last_checkpoint()
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] / config.optim.lr for entry in history if "learning_rate" in entry]


def test_a_resumed_run_has_the_time_that_remained(tiny, trainer):
    config = tiny(steps=None, max_minutes=3.0, optim=OptimConfig(lr=1e-2, warmup_steps=4))

    def step(number):
        if number == 10:
            signal.raise_signal(signal.SIGTERM)
        return 6.0

    trainer.step = step
    assert train(config).signal == signal.SIGTERM
    first, taken = rates(config), trainer.seconds
    trainer.time = trainer.began = 5.0  # the machine was started anew
    with pytest.raises(ValueError, match=r"max_minutes \(now 9.0, the run has 3.0\)"):
        train(dataclasses.replace(config, max_minutes=9.0), resume=True)
    result = train(config, resume=True).result
    made = result["steps"]
    assert taken + trainer.seconds == pytest.approx(180, abs=18)
    assert 60 * result["minutes"] == pytest.approx(taken + trainer.seconds, abs=1.5)  # a checkpoint is not in
    curve = rates(config)
    assert len(curve) == made == len(result["losses"]["train"])
    assert curve[:11] == pytest.approx(first)
    assert curve[11] == pytest.approx(first[10], abs=0.1)
    assert curve[-1] == pytest.approx(0.1)
    assert (result["config"]["steps"], result["config"]["max_minutes"]) == (None, 3.0)
    assert result["data"]["train_samples"] == made * 4
    blocks = build_data(config.data, 4).train.blocks_per_epoch
    assert result["data"]["epochs"] == pytest.approx(made * 4 / blocks)
    saved = load_config(RunFolder(config.output).config)
    assert (saved.steps, saved.max_minutes, saved.eval_every) == (None, 3.0, None)


def test_a_run_whose_time_is_up_makes_no_more_steps(tiny, trainer, monkeypatch):
    config = tiny(steps=None, max_minutes=1.0)
    trainer.step = lambda number: 1.0 if number < 5 else 90.0

    def broken(*args):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_results", broken)
        with pytest.raises(OSError, match="no room"):
            train(config)
    assert trainer.taken == 6
    assert train(config, resume=True).result["steps"] == trainer.taken == 6


def test_a_damaged_clock_is_named(tiny, trainer):
    config = tiny(steps=None, max_minutes=1.0)
    clock = RunClock(config)
    place = clock.place()
    clock.go_on(place)
    with pytest.raises(ValueError, match="place in the time of the run"):
        clock.go_on(place | {"seconds": math.nan})


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(tiny, tmp_path):
    """The second has a fast clock of its own; were it to read it, the first would wait for ever."""
    config = tiny(steps=None, max_minutes=0.15, sample_tokens=0)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config))))
    script = tmp_path / "two.py"
    script.write_text(
        "import json, time\n"
        "from pathlib import Path\n"
        "from nested_learning.training.process import process_state\n"
        "rank = process_state().process_index\n"
        "real = time.monotonic\n"
        "from nested_learning.training import timing\n"
        "if rank: timing.RunClock.seconds = property(lambda self: 7 * (real() - self.begun))\n"
        "from nested_learning.training.trainer import HopeTrainer\n"
        "ends, rates = [], []\n"
        "keep = timing.RunClock.on_step_end\n"
        "def on_step_end(self, args, state, control, **kwargs):\n"
        "    rates.append(kwargs['optimizer'].param_groups[0]['lr'])\n"
        "    return keep(self, args, state, control, **kwargs)\n"
        "timing.RunClock.on_step_end = on_step_end\n"
        "from nested_learning.training.config_file import load_config\n"
        "from nested_learning.training.run import train\n"
        f"train(load_config(Path(r'{path}')))\n"
        f"open(r'{tmp_path}/' + str(rank), 'w').write(json.dumps(rates))\n"
        "process_state().destroy_process_group()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, str(script)], env=environment, timeout=300, check=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert one == two
    assert len(one) > 1
    assert json.loads(RunFolder(config.output).result.read_text())["steps"] == len(one)
