"""The wheel and the sdist of a commit: built with pinned tools, compared with its files, tried.

Nothing but Python and git is needed; all that is made on the way lies in one temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from release.versions import ROOT, disagreements, version

NAME = "nested_learning_torch"
PACKAGE = "nested_learning"
# Files beside the code that explain it to those who read it in the repository.
NOT_IN_THE_WHEEL = frozenset({"nested_learning/ops/delta_rule/README.md"})
# What the sdist has beside the package.
ROOT_FILES = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
# Variables that would let the environment see other packages than those installed in it.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class NotReady(Exception):
    """The repository is not in a state to release, or what was built is not what it should be."""


def wheel_files(tracked: Iterable[str]) -> set[str]:
    """Those of a repository's files that the wheel has, its own records apart."""
    return {name for name in tracked if name.startswith(f"{PACKAGE}/")} - NOT_IN_THE_WHEEL


def compare_files(what: str, expected: set[str], found: set[str]) -> None:
    """Raise NotReady where `found` are not the files that are expected, with each name."""
    lines = [f"{what} lacks {name}: name it in package-data of pyproject.toml" for name in expected - found]
    lines += [f"{what} has {name}, which is not in the repository's package" for name in found - expected]
    if lines:
        raise NotReady("\n".join(sorted(lines)))


def check_wheel(wheel: Path, tracked: Iterable[str]) -> None:
    """Raise NotReady where a wheel does not have exactly the files of the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = {
            name for name in archive.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")
        }
    compare_files(wheel.name, wheel_files(tracked), names)


def check_sdist(sdist: Path, tracked: Iterable[str]) -> None:
    """Raise NotReady where an sdist does not have the files of the package and what tells of it, no other."""
    with tarfile.open(sdist) as archive:
        names = {"/".join(PurePosixPath(member.name).parts[1:]) for member in archive if member.isfile()}
    written = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    compare_files(sdist.name, wheel_files(tracked) | set(ROOT_FILES), names - written - NOT_IN_THE_WHEEL)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints, run apart from the packages of this process.

    Raises:
        NotReady: it failed; the message has what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN} | variables
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise NotReady(f"{' '.join(words)}\n{done.stdout}{done.stderr}\nended with {done.returncode}")
    return done.stdout


def environment(folder: Path, *install: str | Path) -> Path:
    """The Python of a new virtual environment, with what `pip install` is told to install."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip(python, "install", *install)
    return python


def pip(python: Path, *words: str | Path) -> None:
    """One call of an environment's pip."""
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words, cwd=ROOT)


def export(folder: Path) -> list[str]:
    """Write the files of the present commit into a new folder; their names.

    Raises:
        NotReady: a file is changed or new and not committed, so that the commit is not what lies here.
    """
    changed = run("git", "status", "--porcelain", cwd=ROOT)
    if changed:
        raise NotReady(f"what is built is the commit; commit these changes, or take them away:\n{changed}")
    archive = folder.with_suffix(".zip")
    run("git", "archive", "--output", archive, "HEAD", cwd=ROOT)
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    return run("git", "ls-files", cwd=ROOT).splitlines()


def build(work: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of the present commit in the folder `work`, the wheel built from the sdist."""
    source, built = work / "source", work / "built"
    tracked = export(source)
    python = environment(work / "tools", "-r", ROOT / "requirements-dist.lock")
    epoch = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()  # dates of the files in the wheel
    run(python, "-m", "build", "--no-isolation", "--outdir", built, source, cwd=work, SOURCE_DATE_EPOCH=epoch)
    wheel = built / f"{NAME}-{version()}-py3-none-any.whl"
    sdist = built / f"{NAME}-{version()}.tar.gz"
    check_wheel(wheel, tracked)
    check_sdist(sdist, tracked)
    return wheel, sdist


def try_out(python: Path, work: Path) -> None:
    """Run the smoke test with an environment's Python, outside the repository and without a network."""
    elsewhere = Path(tempfile.mkdtemp(dir=work))
    script = shutil.copy(ROOT / "release" / "smoke.py", elsewhere)  # beside it lies no package
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "cache")}
    print(run(python, script, version(), cwd=elsewhere, **offline), end="", flush=True)


def make(output: Path) -> None:
    """Build the wheel and the sdist, try both in an empty environment, and only then put them into `output`.

    Args:
        output: folder; files of the same names in it are replaced.

    Raises:
        NotReady: versions that disagree, changes that are not committed, wrong files, or a failing step.
    """
    if wrong := disagreements():
        raise NotReady("\n".join(wrong))
    with tempfile.TemporaryDirectory(prefix="nested-learning-dist-") as temporary:
        work = Path(temporary)
        print("Building the wheel and the sdist ...", flush=True)
        wheel, sdist = build(work)
        print("Installing the wheel into an empty environment (a few minutes) ...", flush=True)
        python = environment(work / "empty", "--constraint", ROOT / "requirements.lock", wheel)
        print("Trying the wheel ...", flush=True)
        try_out(python, work)
        print("Trying the sdist ...", flush=True)
        pip(python, "uninstall", "--yes", NAME)
        pip(python, "install", "--requirement", ROOT / "requirements-dist.lock")
        pip(python, "install", "--no-deps", "--no-build-isolation", sdist)
        try_out(python, work)
        output.mkdir(parents=True, exist_ok=True)
        for file in (wheel, sdist):
            kept = Path(shutil.move(file, output / file.name))
            print(f"{hashlib.sha256(kept.read_bytes()).hexdigest()}  {kept}")
