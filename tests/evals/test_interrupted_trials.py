"""An evaluation in several processes that is interrupted ends them at once and keeps what was finished."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_workers import alive, within

ROOT = Path(__file__).parents[2]
SLEEPER = """
import os, sys, time
from pathlib import Path
from nested_learning.cli.main import main
from nested_learning.evals import register_method, register_task
from tests.evals.guessing import GOOD, Coin

class Sleeper(Coin):
    name = "sleeper"

    def run(self, method, seed):
        Path(f"seed{seed}").write_text(str(os.getpid()))
        if seed and not Path("awake").exists():
            time.sleep(600)
        return super().run(method, seed)

if __name__ == "__main__":
    import sleeper  # its name in the workers
    register_task(sleeper.Sleeper)
    register_method(GOOD)
    sys.exit(main(["eval", "sleeper", "--methods", "good", "--jobs", "2", "--quiet", "--output", "runs"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_an_interrupt_ends_all_processes_and_the_next_run_goes_on(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "sleeper.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}

    def begun():
        return all((tmp_path / f"seed{seed}").is_file() for seed in (1, 2))

    def kept():
        return sorted((tmp_path / "runs" / "trials").glob("*.json"))

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        try:
            assert within(240, lambda: kept() and begun())
            os.killpg(parent.pid, signal.SIGINT)
            told = parent.communicate(timeout=60)[1]
        finally:
            parent.kill()
    assert parent.returncode == 130
    assert "Traceback" not in told
    assert not any(alive(int((tmp_path / f"seed{seed}").read_text())) for seed in (0, 1, 2))
    (first,) = kept()
    assert json.loads(first.read_text())["key"]["seed"] == 0

    (tmp_path / "awake").touch()
    (tmp_path / "seed0").unlink()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240, stdout=subprocess.DEVNULL)
    assert not (tmp_path / "seed0").exists()  # not run again
    assert len(kept()) == 3
