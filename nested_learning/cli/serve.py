"""`nested-learning serve`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from nested_learning._files import MIB
from nested_learning.cli.level_flags import (
    ANCHOR_FLAGS,
    LEVEL_FLAGS,
    add_anchor_flags,
    add_level_flags,
    gives_levels,
    levels_and_starts,
)
from nested_learning.cli.output import say
from nested_learning.cli.parsing import new_parser, parse
from nested_learning.server.settings import ServeSettings

if TYPE_CHECKING:
    from nested_learning.continual.level import Level
    from nested_learning.continual.starts.starts import Starts
    from nested_learning.server.mind import Mind

DESCRIPTION = """\
A server whose model remembers each user, with the HTTP interface that OpenAI's clients speak.

MODEL is a folder written by save_pretrained, the --output folder of a completed run, a trained model of the
package, or a name that transformers can download. Each user has a memory, in a folder of its own below
--memories: deltas on the model's MLPs, or of a Hope model, which has memories itself, their states. The
turns of a conversation are learned after its answer; /v1/memories shows what was learned, takes it back,
and deletes it. A page to talk is at /.

examples:
  nested-learning serve --model SmolLM2-135M-Instruct --memories memories/
  nested-learning serve --model runs/first --memories memories/
  nested-learning serve --model my-model --memories memories/ --keys keys.txt --add_key anna
  nested-learning serve --model my-model --memories memories/ --keys keys.txt --host 0.0.0.0
"""
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def run(argv: list[str]) -> int:
    """Parse, load, serve until told to end. Returns the exit code."""
    parser = new_parser("serve", "--model MODEL --memories FOLDER ", DESCRIPTION)
    parser.add_class_arguments(ServeSettings, None)
    add_level_flags(parser, chunk_sizes=(32, 128, 512), level_lr=0.1)
    add_anchor_flags(parser)
    values = parse(parser, argv)
    settings = ServeSettings(**{name: values[name] for name in ServeSettings.__dataclass_fields__})
    levels, starts = levels_and_starts(values, argv)
    anchors = {name: values[name] for name in ANCHOR_FLAGS}
    if settings.add_key is not None:
        from nested_learning.server.keys import add_key

        assert settings.keys is not None
        print(add_key(settings.keys, settings.add_key))
        say("this key is not shown again: only its hash is kept")
        return 0
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'nested-learning-torch[serve]'")

    from nested_learning.server.run import serve

    own = gives_levels(argv) or any(anchors.values())
    return serve(load_mind(settings, levels, own, **anchors, starts=starts), settings)


def load_mind(
    settings: ServeSettings,
    levels: tuple[Level, ...],
    own_levels: bool,
    background: str | None = None,
    fisher: str | None = None,
    starts: Starts | None = None,
) -> Mind:
    """The model of the settings with its way of remembering.

    Args:
        settings: the server's settings.
        levels: levels of a pretrained model that is no Hope model.
        own_levels: whether the command line has described them.
        background, fisher: files of their anchors; see `AnchorFiles`.
        starts: what they begin with.

    Raises:
        ValueError, OSError: there is no such model, or it is a Hope model and levels were described.
    """
    from nested_learning.cli.conversation import is_hope, load_model
    from nested_learning.cli.dialogue import load_pretrained
    from nested_learning.continual import Learner, stack_levels
    from nested_learning.continual.objectives.anchor_files import AnchorFiles
    from nested_learning.models import HopeForCausalLM
    from nested_learning.server.hope_mind import HopeMind
    from nested_learning.server.level_mind import LevelMind

    files = AnchorFiles(background, fisher)
    model, tokenizer = (load_model if is_hope(settings.model) else load_pretrained)(settings.model)
    if not isinstance(model, HopeForCausalLM):
        anchors = files.of(model, tokenizer, levels)

        def learner() -> Learner:
            return stack_levels(model, tokenizer, levels=levels, starts=starts, **anchors)

        return LevelMind(learner, settings.weights_mb * MIB)
    if own_levels:
        raise ValueError(
            f"{settings.model} is a Hope model, whose memories have speeds of their own; leave out the flags "
            f"of levels (--{', --'.join((*LEVEL_FLAGS, *ANCHOR_FLAGS))})"
        )
    return HopeMind(model, tokenizer)
