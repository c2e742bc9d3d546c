"""The command `nested-learning generate`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from nested_learning._checks import check_types, require, require_seed
from nested_learning._progress import Progress, progress
from nested_learning.cli.output import human_bytes, print_json, say
from nested_learning.cli.parsing import new_parser, parse
from nested_learning.server.settings import COLDEST

DESCRIPTION = """\
Continue a prompt with a saved model, printed as it comes.

MODEL is a folder written by save_pretrained, or the --output folder of a completed run. --save_state
writes what the model remembers to one file; --load_state goes on from there, now or later: the text read
so far is neither needed nor read again.

examples:
  nested-learning generate runs/first --prompt 'def main(' --max_new_tokens 300
  nested-learning generate runs/first --prompt 'Once' --save_state talk.safetensors
  nested-learning generate runs/first --load_state talk.safetensors --prompt ' upon a time'
  nested-learning generate runs/first --prompt 'Once' --max_new_tokens 20000 --compile
"""


@dataclass(kw_only=True)
class GenerateConfig:
    """The text to continue, and the sampling.

    Args:
        prompt: text to continue; may be empty
        max_new_tokens: tokens to generate
        temperature: divides the logits; below 1 the text is safer, above 1 wilder; 0 always takes the
            likeliest token
        top_k: sample among the k likeliest tokens only; 0 for all
        top_p: sample among the likeliest tokens that together have this probability
        seed: seed of the sampling
        save_state: file to write the state to after generating
        load_state: file to read the state from before the prompt
        compile: read single tokens through torch.compile; the first one takes a while
    """

    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    save_state: str | None = None
    load_state: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "a whole number above 0")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or a positive number")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or a whole number above 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a probability above 0, at most 1")
        require_seed(self.seed)

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`."""
        if self.temperature < COLDEST:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


class _TokenCounter:
    """A streamer of transformers that counts the tokens after the prompt, which comes first."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.after_prompt = False

    def put(self, value: Any) -> None:
        if self.after_prompt:
            self.bar.advance(len(value))
        self.after_prompt = True

    def end(self) -> None:
        """Nothing is left to show."""


def run(argv: list[str]) -> int:
    """Parse, generate, print. Returns the exit code."""
    parser = new_parser("generate", "MODEL ", DESCRIPTION)
    parser.add_argument("model", type=str, help="folder of a saved model or of a completed run")
    parser.add_argument("--json", action="store_true", help="print text and timings as JSON, alone on stdout")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="read single tokens through torch.compile: faster, but the first of a process takes a while",
    )
    parser.add_class_arguments(GenerateConfig, None, skip={"compile"})
    values = parse(parser, argv)
    fields = GenerateConfig.__dataclass_fields__
    config = GenerateConfig(**{name: values[name] for name in fields})
    result = generate(values.model, config, stream=not values.json)
    if values.json:
        print_json(result)
    else:
        say(
            f"{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} per second; the state holds "
            f"{result['tokens_seen']:,} tokens in {human_bytes(result['state_bytes'])}"
        )
        if config.save_state is not None:
            say(f"state saved in {config.save_state}")
    return 0


def generate(model_folder: str, config: GenerateConfig, *, stream: bool) -> dict[str, Any]:
    """Generate after the prompt, or after the loaded state and the prompt.

    Args:
        model_folder: folder of a saved model or of a completed run, as for `load_model`.
        config: the prompt and the sampling.
        stream: print prompt and text to stdout as they come.

    Raises:
        ValueError: a folder or state file that is missing, damaged or of another model; a state to be
            written over a folder, a device or a pipe.
        OSError: the state file cannot be written.
    """
    from accelerate.utils import set_seed
    from transformers import CompileConfig

    from nested_learning._files import writable
    from nested_learning.cli.conversation import Conversation, load_model
    from nested_learning.cli.shown_text import ShownText

    if config.save_state is not None:
        writable(config.save_state)  # refused before a long text is written
    model, tokenizer = load_model(model_folder)
    conversation = Conversation.open(model, tokenizer, config.load_state)
    shown = ShownText(tokenizer, outlives_reader=config.save_state is not None) if stream else None
    if shown:
        shown.on_finalized_text(config.prompt)
    options = config.sampling()
    if config.compile:
        options["compile_config"] = CompileConfig()
        options["compile_config"]._compile_all_devices = True
    set_seed(config.seed)
    start = time.perf_counter()
    with nullcontext() if stream else progress("generating", config.max_new_tokens, "token") as bar:
        new_ids = conversation.generate(
            config.prompt,
            max_new_tokens=config.max_new_tokens,
            streamer=_TokenCounter(bar) if bar else shown,
            **options,
        )
    seconds = time.perf_counter() - start
    if config.save_state is not None:
        conversation.save(config.save_state)
    if shown and shown.left:
        say(f"nobody read on; state saved in {config.save_state}")
        raise shown.left
    return {
        "prompt": config.prompt,
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "new_tokens": len(new_ids),
        "seconds": seconds,
        "tokens_per_second": len(new_ids) / seconds,
        "tokens_seen": conversation.tokens_seen,
        "state_bytes": conversation.cache.nbytes(),
        "state_file": config.save_state,
    }
