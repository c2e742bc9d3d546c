"""Time until an answer, in fresh processes: `python -m benchmarks.start`.

- `import nested_learning` against `import torch, transformers` and against an interpreter that does nothing;
- the first name that needs torch, and the first Auto class;
- `nested-learning` with `--help`, the help of every command, an unknown command, an unknown flag.

Medians of wall times, all called in turn. A gate first: those that are to be quick import no torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import interleaved, parser, record, show
from nested_learning.cli.main import COMMANDS

NOTHING, OURS, TORCH = "python -c pass", "import nested_learning", "import torch, transformers"
IMPORTS = {
    NOTHING: "pass",
    OURS: OURS,
    TORCH: TORCH,
    "nested_learning.HopeForCausalLM": "import nested_learning; nested_learning.HopeForCausalLM",
    "transformers.AutoModelForCausalLM": "import transformers; transformers.AutoModelForCausalLM",
    "the two together": "import nested_learning, transformers; transformers.AutoModelForCausalLM",
}
LINES = {
    "--help": ["--help"],
    **{f"{name} --help": [name, "--help"] for name in COMMANDS},
    "an unknown command": ["trian"],
    "an unknown flag": ["train", "--stepps", "3"],
}
_COMMAND = "import sys; from nested_learning.cli.main import main; sys.exit(main(sys.argv[1:]))"
_GATE = "; assert not {'torch', 'transformers'} & {*__import__('sys').modules}"


def run(code: str, argv: Sequence[str] = (), codes: tuple[int, ...] = (0,)) -> None:
    """Run code in a fresh interpreter. RuntimeError for another exit code than those expected."""
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise RuntimeError(f"{code!r} with {list(argv)} ended with {done.returncode}: {done.stderr}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write; returns the figures."""
    options = parser(__doc__).parse_args(argv)
    imports, lines = IMPORTS, LINES
    if options.quick:
        imports = {name: IMPORTS[name] for name in (NOTHING, OURS)}
        lines = {name: LINES[name] for name in ("--help", "an unknown command")}
    run(OURS + _GATE)
    works = {name: lambda code=code: run(code) for name, code in imports.items()}
    works |= {
        f"nested-learning: {name}": lambda line=line: run(_COMMAND, line, (0, 2))
        for name, line in lines.items()
    }
    seconds = interleaved(works, options.repeats or (1 if options.quick else 7))
    rows = [{"start": name, "seconds": value} for name, value in seconds.items()]
    show("seconds until the process has ended", rows)
    return record({"rows": rows}, options.json)


if __name__ == "__main__":
    main()
