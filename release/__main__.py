"""`python -m release check`, `notes VERSION`, `build`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from release.distribution import NotReady, make
from release.versions import ROOT, disagreements, notes, version


def main(words: list[str] | None = None) -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m release", description="What makes a release.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="whether every file has the same version")
    told = commands.add_parser("notes", help="the notes of a release, from CHANGELOG.md")
    told.add_argument("version", nargs="?", default=version(), help="default: the present one")
    built = commands.add_parser("build", help="wheel and sdist of the commit, tried in an empty environment")
    built.add_argument("--output", type=Path, default=ROOT / "dist", help="folder (default: dist)")
    options = parser.parse_args(words)
    try:
        if options.command == "check":
            if wrong := disagreements():
                raise NotReady("\n".join(wrong))
            print(version())
        elif options.command == "notes":
            print(notes(options.version), end="")
        else:
            make(options.output)
    except (NotReady, ValueError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, NotReady) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
