"""The record of a run: versions, hardware, memory, and the plot of its losses."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nested_learning
from nested_learning._files import replacing
from nested_learning._version import __version__

Curve = list[tuple[int, float]]  # (optimizer steps taken, loss in nats per token)


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": num_processes,
        "cores": cores,
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*_columns(train), color="tab:blue", alpha=0.6, linewidth=1, label="training")
    axes.plot(*_columns(validation), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]
