"""Language modelling from random weights: bits per byte at equal parameters and tokens, loss by position."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.fit import Diverged, parameters_of, summary
from nested_learning.evals.method import Method
from nested_learning.evals.methods.models import MODELS, Size, TrainedModel
from nested_learning.evals.registry import register_task
from nested_learning.evals.report.figures import new_figure, save
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.language.text import (
    WIKITEXT,
    SplitText,
    held_out_blocks,
    long_documents,
    name_of,
    split_text,
    training_samples,
    unigram_bits,
    whole_file,
)
from nested_learning.training.compare import Contender, batches
from nested_learning.training.config import OptimConfig
from nested_learning.training.data import bits_per_byte
from nested_learning.training.data.download import find_shakespeare, given_file
from nested_learning.training.data.packing import TokenizedText
from nested_learning.training.data.tokenizers import byte_tokenizer
from nested_learning.training.positions import MODES, score_both_ways
from nested_learning.training.process import process_state


@dataclass(frozen=True)
class LanguageOptions:
    """Options of the evaluations on text.

    Args:
        seeds: seeds that are reported.
        steps: optimizer steps.
        tuning_seeds: other seeds, on which settings are chosen by the mean.
        texts: sources as `train --data` takes them; a model reads equally many blocks of each.
        max_bytes: bytes that are read of each.
        width, layers, heads: size of the models.
        block: tokens (bytes) that training reads at once.
        batch: blocks of a step.
        lrs: peak learning rates; of several the best is chosen on the tuning seeds.
        weight_decay: AdamW's.
        blocks: of each held-out text that are scored, at most.
        length: bytes of the documents that are scored by position, block by block.
        documents: such documents, at most.
    """

    seeds: int
    steps: int
    tuning_seeds: int = 1
    texts: list[str] = field(default_factory=lambda: ["tinyshakespeare", "stdlib"])
    max_bytes: int = 8 << 20
    width: int = 64
    layers: int = 2
    heads: int = 2
    block: int = 256
    batch: int = 8
    lrs: list[float] = field(default_factory=lambda: [4e-3])
    weight_decay: float = 0.1
    blocks: int = 128
    length: int = 2048
    documents: int = 16


@register_task
class LanguageModelling(Task[LanguageOptions]):
    """Bits per byte of models trained from random weights, and what a carried state is worth to them."""

    name = "language"
    title = "language modelling: bits per byte at equal parameters and tokens, loss by position"
    budgets: ClassVar[Mapping[str, Any]] = {
        "smoke": LanguageOptions(
            1,
            2,
            texts=["stdlib"],
            width=32,
            block=64,
            batch=2,
            max_bytes=1 << 20,
            blocks=2,
            length=128,
            documents=1,
        ),
        "small": LanguageOptions(5, 400),
        "full": LanguageOptions(
            5,
            20_000,
            width=256,
            layers=6,
            heads=4,
            block=1024,
            batch=16,
            max_bytes=64 << 20,
            lrs=[1e-3, 2e-3, 4e-3],
            tuning_seeds=3,
            blocks=1024,
            length=16_384,
            documents=64,
        ),
    }
    columns: ClassVar[Mapping[str, str]] = {
        "bits_per_byte": "bits per byte of held-out text, mean over the texts",
        "tinyshakespeare": "bits per byte of Tiny Shakespeare",
        "stdlib": "bits per byte of Python's standard library",
        "wikitext2": "bits per byte of WikiText-2, which no model was trained on",
        "empty": "bits per byte of long documents, each block read from the empty state",
        "carried": "bits per byte of the same, each block read from the state after the one before it",
        "parameters": "parameters that are trained",
        "seconds": "seconds of a run",
    }
    headline = "bits_per_byte"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        return MODELS

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        return [{"lr": lr} for lr in self.options.lrs]

    def missing(self) -> str | None:
        if "tinyshakespeare" in self.options.texts and find_shakespeare() is None:
            return (
                "tinyshakespeare.txt is neither in the folder NESTED_LEARNING_DATA nor in the cache: put it "
                "there, fetch it with `nested-learning train --data tinyshakespeare --steps 1`, or choose "
                "other texts, such as stdlib"
            )
        return None

    def run(self, method: Method, seed: int) -> Figures:
        """Figures of one model. Raises Diverged where its loss is not finite."""
        start = time.perf_counter()
        options, texts = self.options, self._texts()
        contender = self._trained(method, seed, texts)
        figures = self._scores(contender, {name: text.test for name, text in texts.items()})
        if (path := given_file(WIKITEXT)) is not None:
            figures["wikitext2"] = self._bits(contender, whole_file(path))
        documents = long_documents(texts, options.length, options.documents)
        if documents:
            figures |= _by_position(score_both_ways(contender.model, documents, options.block, options.batch))
        return figures | {
            "parameters": parameters_of(contender.model),
            "training_loss": summary(contender.losses),
            "training_seconds": sum(contender.seconds),
            "seconds": time.perf_counter() - start,
        }

    def tune(self, method: Method, seed: int) -> Figures:
        """Figures on held-out text that is not reported."""
        texts = self._texts()
        contender = self._trained(method, seed, texts)
        return self._scores(contender, {name: text.tuning for name, text in texts.items()})

    def constants(self) -> Mapping[str, Figures]:
        """The bytes' frequencies, and no knowledge at all."""
        names = [name_of(source) for source in self.options.texts]
        rows = {"uniform": dict.fromkeys((*names, self.headline), 8.0)}
        if self.missing() is None:
            bits = unigram_bits(self._texts())
            rows["unigram"] = {**bits, self.headline: sum(bits.values()) / len(bits)}
        return rows

    def claims(self) -> Sequence[Claim]:
        return [
            Ahead(
                f"(1) {hope} < Titans < {delta} < Transformer in loss",
                "Table 2",
                self.headline,
                (hope, "titans", delta, "transformer"),
                higher=False,
            )
            for hope in ("hope", "hope-in-context")
            for delta in ("gated-deltanet", "deltanet")
        ]

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Perplexities of Table 2: WikiText and LAMBADA, 760M and 1.3B parameters."""
        names = ("WikiText ppl 760M", "LAMBADA ppl 760M", "WikiText ppl 1.3B", "LAMBADA ppl 1.3B")
        table = {
            "transformer": (24.18, 24.27, 17.92, 17.73),
            "deltanet": (24.52, 24.38, 18.62, 17.10),
            "titans": (20.08, 21.52, 15.60, 11.41),
            "hope": (18.68, 20.07, 14.39, 10.08),
        }
        return {method: dict(zip(names, values, strict=True)) for method, values in table.items()}

    def note(self) -> str:
        o = self.options
        read = o.steps * o.batch * o.block
        chosen = "no rate was tuned" if len(o.lrs) == 1 else "the rate of each model tuned on another seed"
        notes = [
            f"Models of width {o.width} in {o.layers} layers read {read:,} bytes ({', '.join(o.texts)}; the "
            f"library of Python {platform.python_version()}) in blocks of {o.block}; the paper's read 30 to "
            f"100 billion tokens. {chosen[0].upper()}{chosen[1:]} (of {', '.join(map(str, o.lrs))})."
        ]
        if given_file(WIKITEXT) is None:
            notes.append("WikiText-2 is left out: NESTED_LEARNING_DATA has no wikitext2_valid.txt.")
        return " ".join(notes)

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Bits per byte of each model, and loss by position with and without a carried state."""
        figure, (left, right) = new_figure(2, width=6.0, height=4.5)
        scored = [row for row in rows.values() if row.values(self.headline)]
        left.barh(
            [row.method for row in scored],
            [row.mean(self.headline) for row in scored],
            xerr=[row.spread(self.headline) or 0.0 for row in scored],
        )
        left.invert_yaxis()
        left.set(xlabel=self.columns[self.headline])
        starts = sorted(
            {
                int(name.partition("@")[2])
                for row in scored
                for figures in row.figures.values()
                for name in figures
                if name.startswith("carried@")
            }
        )
        for number, row in enumerate(scored):
            for mode, style in zip(MODES, (":", "-"), strict=True):
                points = [(start, row.mean(f"{mode}@{start}")) for start in starts]
                drawn = [point for point in points if point[1] is not None]
                if drawn:
                    label = row.method if mode == MODES[-1] else None
                    right.plot(*zip(*drawn, strict=True), style, color=f"C{number % 10}", label=label)
        right.set(
            xscale="log", xlabel="position in the document", ylabel="bits per byte (dotted: empty state)"
        )
        if right.lines:
            right.legend(fontsize=7)
        save(figure, path)

    def _texts(self) -> dict[str, SplitText]:
        """The texts by the names of their figures. Raises ValueError for two of one name."""
        found = {name_of(source): split_text(source, self.options.max_bytes) for source in self.options.texts}
        if not found or len(found) < len(self.options.texts):
            raise ValueError(f"texts is {self.options.texts}; expected one or more, all of different names")
        return found

    def _trained(self, method: Method, seed: int, texts: Mapping[str, SplitText]) -> Contender:
        """The model after training. Raises Diverged where its loss is not finite."""
        assert isinstance(method, TrainedModel)
        o, device = self.options, process_state().device
        size = Size(len(byte_tokenizer()), o.block, o.width, o.layers, o.heads)
        model = method.new_model(size, seed).to(device)
        lr = float(method.settings.get("lr", o.lrs[0]))
        contender = Contender(
            method.name,
            model,  # type: ignore[arg-type]
            OptimConfig(lr=lr),
            o.steps,
            optimizer=method.optimizer(model, lr, o.weight_decay),
        )
        samples = training_samples(texts, o.block, o.steps * o.batch, seed)
        for batch in batches(samples, o.batch, device):
            contender.step(batch)
            if contender.diverged_at is not None:
                raise Diverged(
                    f"the loss of step {contender.diverged_at} is not finite at a learning rate of {lr:g}"
                )
        return contender

    def _scores(self, contender: Contender, texts: Mapping[str, TokenizedText]) -> Figures:
        bits = {name: self._bits(contender, text) for name, text in texts.items()}
        return {self.headline: sum(bits.values()) / len(bits), **bits}

    def _bits(self, contender: Contender, text: TokenizedText) -> float:
        o = self.options
        blocks = held_out_blocks(text, o.block, o.blocks)
        size = min(o.batch, len(blocks))
        nats = contender.validate(batches(blocks, size, process_state().device))
        if nats is None:
            raise Diverged("the loss of held-out text is not finite")
        return bits_per_byte(nats, text.bytes_per_token)


def _by_position(score: Mapping[str, Any]) -> Figures:
    """Figures of `score_both_ways` in bits per byte: each way of reading, in all and from each position."""
    found: Figures = {mode: _in_bits(nats) for mode, nats in score["nats_per_token"].items()}
    return found | {f"{mode}@{row['from']}": _in_bits(row[mode]) for row in score["table"] for mode in MODES}


def _in_bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)
