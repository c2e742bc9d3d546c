"""`nested-learning serve`."""

from __future__ import annotations

from importlib.util import find_spec

from nested_learning._files import MIB
from nested_learning.cli.level_flags import add_level_flags, levels_of
from nested_learning.cli.output import say
from nested_learning.cli.parsing import new_parser, parse
from nested_learning.server.settings import ServeSettings

DESCRIPTION = """\
A server whose model remembers each user, with the HTTP interface that OpenAI's clients speak.

MODEL is a folder written by save_pretrained, or a name that transformers can download. Each user has a memory
of deltas on its MLPs, in a folder of its own below --memories. The turns of a conversation are learned after
its answer; /v1/memories shows what was learned, takes it back, and deletes it. A page to talk is at /.

examples:
  nested-learning serve --model SmolLM2-135M-Instruct --memories memories/
  nested-learning serve --model my-model --memories memories/ --keys keys.txt --add_key anna
  nested-learning serve --model my-model --memories memories/ --keys keys.txt --host 0.0.0.0
"""
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def run(argv: list[str]) -> int:
    """Parse, load, serve until told to end. Returns the exit code."""
    parser = new_parser("serve", "--model MODEL --memories FOLDER ", DESCRIPTION)
    parser.add_class_arguments(ServeSettings, None)
    add_level_flags(parser, chunk_sizes=(32, 128, 512), level_lr=0.1)
    values = parse(parser, argv)
    settings = ServeSettings(**{name: values[name] for name in ServeSettings.__dataclass_fields__})
    levels = levels_of(values)
    if settings.add_key is not None:
        from nested_learning.server.keys import add_key

        assert settings.keys is not None
        print(add_key(settings.keys, settings.add_key))
        say("this key is not shown again: only its hash is kept")
        return 0
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'nested-learning-torch[serve]'")

    from nested_learning.cli.dialogue import load_pretrained
    from nested_learning.continual import stack_levels
    from nested_learning.server.mind import LevelMind
    from nested_learning.server.run import serve

    model, tokenizer = load_pretrained(settings.model)
    mind = LevelMind(lambda: stack_levels(model, tokenizer, levels=levels), settings.weights_mb * MIB)
    return serve(mind, settings)
