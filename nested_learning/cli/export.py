"""`nested-learning export`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from nested_learning.cli.level_flags import add_anchor_flags
from nested_learning.cli.output import print_json, print_table
from nested_learning.cli.parsing import new_parser, parse

if TYPE_CHECKING:
    from nested_learning.continual import Exported

DESCRIPTION = """\
Write what a memory file has learned so that other programs can serve it: a plain checkpoint of transformers
with the memory merged in, or, with --lora_rank, a LoRA adapter for peft.

MODEL is the base model that FILE was learned on: a folder written by save_pretrained, or a name that
transformers can download. Levels and way of reading are those of the file. FOLDER must not be there yet; it
appears whole or not at all. How far its logits are from the learner's is printed.

examples:
  nested-learning export --model SmolLM2-135M-Instruct --memory anna.safetensors --output anna
  nested-learning export --model my-model --memory anna.safetensors --output anna-lora --lora_rank 16
"""


def run(argv: list[str]) -> int:
    """Parse, export, print. Returns the exit code."""
    parser = new_parser("export", "--model MODEL --memory FILE --output FOLDER ", DESCRIPTION)
    parser.add_argument("--model", type=str, required=True, help="folder or name of the base model")
    parser.add_argument("--memory", type=str, required=True, metavar="FILE", help="file of the memory")
    parser.add_argument("--output", type=str, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--starts", type=str, metavar="FILE", help="starts that the memory was learned from")
    parser.add_argument("--lora_rank", type=int, help="rank of a LoRA adapter; without one, a checkpoint")
    parser.add_argument("--row", type=int, default=0, help="row of the memory")
    parser.add_argument("--levels", type=int, nargs="+", help="levels that are exported, 0 is the fastest")
    add_anchor_flags(parser)
    parser.add_argument("--probe", type=str, metavar="TEXT", help="text to compare logits on")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, alone on stdout")
    values = parse(parser, argv)

    from nested_learning.cli.dialogue import load_pretrained
    from nested_learning.continual.exporting.export import check_rank, unused
    from nested_learning.continual.objectives.anchor_files import AnchorFiles
    from nested_learning.continual.reopen import reopen

    unused(values.output)  # before a large model is loaded
    check_rank(values.lora_rank)
    files = AnchorFiles(values.background, values.fisher)
    model, tokenizer = load_pretrained(values.model)
    learner = reopen(values.memory, model, tokenizer, starts=values.starts, **files.of(model, tokenizer))
    report = learner.export(
        values.output,
        row=values.row,
        levels=values.levels,
        lora_rank=values.lora_rank,
        probe=values.probe,
    )
    print_json({**asdict(report), "folder": str(report.folder)}) if values.json else _print(report)
    return 0


def _print(report: Exported) -> None:
    rows = [
        ("weights that have changed", f"{len(report.weights):,}"),
        ("largest difference in logits", f"{report.difference:.3g}"),
        ("largest logit", f"{report.largest_logit:.3g}"),
    ]
    if report.kind == "adapter":
        worst = max(report.truncation.items(), key=lambda pair: pair[1], default=("-", 0.0))
        rows += [
            ("cut by the rank, of the norm of all deltas", f"{report.truncated:.3g}"),
            (f"most of all in {worst[0]}", f"{worst[1]:.3g}"),
        ]
    print_table(f"{report.kind} in {report.folder}", ("", "value"), rows)
