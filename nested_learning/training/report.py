"""The record of a run: versions, hardware, memory, and the plot of its losses."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nested_learning
from nested_learning._files import replacing
from nested_learning._version import __version__
from nested_learning._workers import usable_cores

Curve = Sequence[tuple[float, float]]  # (optimizer steps taken, or another place, loss in nats per token)


def versions() -> dict[str, str | None]:
    """Versions of the packages a result depends on, and this package's git revision if it is a checkout."""
    packages = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")
    return {
        "nested_learning": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def git_revision() -> str | None:
    """`git describe` of the checkout this package lies in, "-dirty" if changed; None without one."""
    package = Path(nested_learning.__file__).parent
    try:
        root = _git(package, "rev-parse", "--show-toplevel")
        if not root or Path(root).resolve() != package.parent.resolve():
            return None  # installed into some other project's checkout
        return _git(package, "describe", "--always", "--dirty", "--abbrev=12") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def hardware(device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """The machine: device, its name, processes, cores that this process may use, threads, system."""
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": num_processes,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory used so far, in bytes, and the kind of memory that is counted."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "tensors on the GPU"}
    return {"bytes": peak_rss(), "of": "the whole process (peak resident set)"}


def peak_rss() -> int:
    """Peak resident set of this process in bytes; 0 where the system does not tell (Windows)."""
    try:  # Linux: `ru_maxrss` would begin with the parent's peak, this one with the program's own start
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # kilobytes on Linux, bytes on macOS


def plot_losses(path: Path, train: Curve, validation: Curve, title: str) -> None:
    """Write both loss curves as a PNG, whole or not at all."""
    with _plotting(path, "optimizer step", title) as axes:
        axes.plot(*_columns(train), color="tab:blue", alpha=0.6, linewidth=1, label="training")
        axes.plot(*_columns(validation), color="tab:orange", marker="o", markersize=4, label="validation")


def plot_positions(path: Path, curves: Mapping[str, Curve], title: str) -> None:
    """Write curves of (position in the document, loss in nats per token) as a PNG, whole or not at all."""
    with _plotting(path, "position in the document (tokens)", title) as axes:
        for label, curve in curves.items():
            axes.plot(*_columns(curve), marker="o", markersize=4, label=label)
        axes.set_xscale("log", base=2)


@contextmanager
def _plotting(path: Path, xlabel: str, title: str) -> Iterator[Any]:
    """Axes of a figure of losses, which is written at the end of the block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    yield axes
    axes.set(xlabel=xlabel, ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]
