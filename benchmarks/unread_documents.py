"""Documents that a model cannot have read: files of pinned packages that older releases have not.

Chooses the manifest of `nested-learning eval longdoc`. A file qualifies where its package's last release
before the model has no file of its path, and no file of any of those releases has a fifth or more of its
distinct 5-grams of words; the chosen ones are as far from each other. Models that transformers has ported are
left out, since they may have been published elsewhere before, and so are tables of numbers. Get the old
releases first, for example

    pip download --no-deps --prefer-binary --dest releases transformers==4.46.1 accelerate==1.0.1 …
    python -m benchmarks.unread_documents releases > nested_learning/evals/tasks/longdoc/documents.json

A table of the candidates goes to the standard error output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from nested_learning.evals.methods.pretrained.base import load_base
from nested_learning.evals.tasks.longdoc.documents import KINDS, LONG, SHORT, TUNING

LOCK = Path(__file__).parents[1] / "requirements.lock"
GRAM, OVERLAP = 5, 0.2
TOKENS, LONG_TOKENS = 8192, 32_768
MOST_PER_PACKAGE = 3  # documents that are not long
MOST_DIGITS = 0.1  # share of the characters
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Candidate:
    """A file that an installed package has and its old release has not.

    Attributes:
        package, version: as in requirements.lock.
        path: in the folder of installed packages.
        content: bytes.
        grams: hashes of its distinct 5-grams of words.
    """

    package: str
    version: str
    path: str
    content: bytes
    grams: frozenset[int]

    @property
    def kind(self) -> str:
        """Source, tests or docs."""
        parts = PurePosixPath(self.path).parts
        if any(part in ("tests", "testing") or part.startswith("test_") for part in parts):
            return "tests"
        return KINDS[PurePosixPath(self.path).suffix]

    def entry(self) -> dict[str, str]:
        """The file in the manifest."""
        return {"path": self.path, "sha256": hashlib.sha256(self.content).hexdigest()}


def canonical(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def grams_of(text: str) -> frozenset[int]:
    """Hashes of the distinct 5-grams of words and signs."""
    words = WORD.findall(text)
    return frozenset(hash(tuple(words[i : i + GRAM])) for i in range(len(words) - GRAM + 1))


def releases(folder: Path) -> list[tuple[str, str]]:
    """Name and version of each wheel and source archive of a folder."""
    names = (path.name.removesuffix(".tar.gz") for path in sorted(folder.iterdir()))
    return [(name.split("-")[0], name.split("-")[1]) for name in names]


def old_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(package, path, text) of every text file in the wheels and source archives of a folder."""
    for archive in sorted(folder.iterdir()):
        package = canonical(archive.name.split("-")[0])
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                for name in opened.namelist():
                    if PurePosixPath(name).suffix in KINDS:
                        yield package, name, opened.read(name).decode("utf-8", "replace")
        elif archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as opened:
                for member in opened:
                    if member.isfile() and PurePosixPath(member.name).suffix in KINDS:
                        content = opened.extractfile(member)
                        assert content is not None
                        name = member.name.partition("/")[2].removeprefix("src/")
                        yield package, name, content.read().decode("utf-8", "replace")


def new_files(package: str, known: set[str]) -> Iterator[Candidate]:
    """Files of an installed package, at its version of requirements.lock, that the old release has not."""
    pins = dict(line.split("==") for line in LOCK.read_text().split() if "==" in line)
    pins = {canonical(name): version for name, version in pins.items()}
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        return
    if pins.get(package) != installed.version.partition("+")[0]:
        return
    for file in installed.files or ():
        path = PurePosixPath(file.as_posix())
        metadata = any(part.endswith(".dist-info") for part in path.parts)
        ported = str(path).startswith("transformers/models/")  # may have been published before it came there
        if path.suffix not in KINDS or metadata or ported or str(path) in known:
            continue
        content = Path(str(installed.locate_file(file))).read_bytes()
        text = content.decode("utf-8", "replace")
        if sum(map(str.isdigit, text)) > MOST_DIGITS * len(text):  # a table of numbers
            continue
        yield Candidate(package, installed.version, str(path), content, grams_of(text))


def unread(folder: Path) -> list[Candidate]:
    """Candidates that no old file has a fifth of."""
    paths: dict[str, set[str]] = defaultdict(set)
    for package, path, _ in old_files(folder):
        paths[package].add(path)
    found = [each for package in sorted(paths) for each in new_files(package, paths[package])]
    found = [each for each in found if len(each.content) > 4000]
    holders: dict[int, list[int]] = defaultdict(list)
    for place, each in enumerate(found):
        for gram in each.grams:
            holders[gram].append(place)
    highest = [0] * len(found)
    for _, _, text in old_files(folder):
        shared = Counter(place for gram in grams_of(text) for place in holders.get(gram, ()))
        for place, count in shared.items():
            highest[place] = max(highest[place], count)
    return [each for each, most in zip(found, highest, strict=True) if most < OVERLAP * len(each.grams)]


def apart(each: Candidate, chosen: list[Candidate]) -> bool:
    """Whether a candidate shares less than a fifth with each that is chosen."""
    return all(len(each.grams & other.grams) < OVERLAP * len(each.grams) for other in chosen)


def choose(found: list[Candidate], tokens: dict[str, int]) -> list[dict[str, object]]:
    """Documents of the manifest: long ones of the packages with most to read, short ones of all in turn."""
    chosen: list[Candidate] = []
    by_package: dict[str, list[Candidate]] = defaultdict(list)
    for each in sorted(found, key=lambda each: (-tokens[each.path], each.path)):
        by_package[each.package].append(each)
    longs = []
    for files in sorted(by_package.values(), key=lambda files: -sum(tokens[each.path] for each in files)):
        if len(longs) < LONG and (taken := filled(files, chosen, tokens, LONG_TOKENS)):
            longs.append(document(taken, "long"))
            chosen += taken
    shorts: list[dict[str, object]] = []
    count: Counter[str] = Counter()
    wanted = SHORT + TUNING
    while len(shorts) < wanted:
        before = len(shorts)
        for package, files in sorted(by_package.items()):
            taken = filled(files, chosen, tokens, TOKENS)
            if taken and count[package] < MOST_PER_PACKAGE and len(shorts) < wanted:
                chosen += taken
                count[package] += 1
                shorts.append(document(taken, "short"))
        if len(shorts) == before:
            raise SystemExit(f"only {before} of {wanted} documents of {TOKENS} tokens")
    for each in shorts[-TUNING:]:
        each["part"] = "tuning"
    return shorts + longs


def filled(
    files: list[Candidate], chosen: list[Candidate], tokens: dict[str, int], least: int
) -> list[Candidate]:
    """The first files of one kind that have `least` tokens together, apart from all that is chosen."""
    for kind in ("docs", "tests", "source"):
        taken: list[Candidate] = []
        for each in files:
            if each.kind == kind and each not in chosen and apart(each, chosen + taken):
                taken.append(each)
                if sum(tokens[one.path] for one in taken) >= least:
                    return taken
    return []


def document(files: list[Candidate], part: str) -> dict[str, object]:
    """A document in the manifest."""
    kinds = Counter(each.kind for each in files)
    return {
        "package": files[0].package,
        "version": files[0].version,
        "kind": kinds.most_common(1)[0][0],
        "part": part,
        "files": [each.entry() for each in files],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("releases", type=Path, help="folder of wheels and source archives of old releases")
    folder = parser.parse_args(arguments).releases
    found = unread(folder)
    base = load_base("smollm2")
    tokens = {each.path: len(base.ids(each.content.decode("utf-8", "replace"))) for each in found}
    for each in sorted(found, key=lambda each: -tokens[each.path]):
        print(f"{tokens[each.path]:8d} {each.kind:7s} {each.package:16s} {each.path}", file=sys.stderr)
    documents = choose(found, tokens)
    names = {canonical(str(each["package"])) for each in documents}
    compared = {canonical(name): release for name, release in releases(folder) if canonical(name) in names}
    print(json.dumps({"compared with": compared, "documents": documents}, indent=1))


if __name__ == "__main__":
    main()
