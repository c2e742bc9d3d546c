"""Tables of docs/results.md that the evaluation's kept runs fill: methods by figures, means over the seeds.

`python -m website.claims` writes each between the two lines of the page that name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Protocol

from nested_learning.evals.claims import interval
from nested_learning.evals.report.write import markdown_cells
from nested_learning.evals.rows import MethodRow, MethodRows

MIXERS = {
    "transformer": "transformer",
    "linear-attention": "linear attention",
    "deltanet": "DeltaNet",
    "gated-deltanet": "Gated DeltaNet",
    "titans": "Titans",
    "self-modifying-titans": "self-modifying Titans",
}
_SKILLS = ("recall", "noisy recall", "fuzzy recall", "copying", "compression", "memorisation")
_HAYSTACKS = (256, 512, 2048, 8192)  # bytes
_SIX, _SHORT = (0, 1, 3, 5, 7, 9), tuple(range(16))  # documents that every reader has read; all short ones
MODELS = {**MIXERS, "hope": "Hope", "hope-in-context": "Hope in context", "hope-attention": "Hope-Attention"}
_TWO = "two, the slow one takes over, the fast one forgets"
_READERS = {  # that stand in several tables
    "window-1k": "window of 1,024 alone",
    "window-8k": "window of 8,192 alone",
    "dynamic-evaluation": "dynamic evaluation (SGD 0.1)",
    "one-level-reading": "one level (Adam 1e-4)",
    "levels-average-reading": f"{_TWO} (2e-4)",
    "levels-average-reading-8k": "two, as above (2e-4)",
}
_LEARNERS = {  # of facts, and of what users tell
    "no-adaptation": "no adaptation",
    "context-2k": "the last 2,048 tokens as context",
    "context-8k": "the last 7,168 as context",
    "fine-tuning": "fine-tuning",
    "lora": "LoRA of rank 8",
    "one-level": "one level",
    "level-rank-8": "one level at rank 8, of `Learner.auto`",
    "level-replay": "one level, half of what it learns read again",
    "level-averaged": _TWO,
    "retrieval-alone": "retrieval, six passages before the question",
    "retrieval-level": "retrieval, so, over one level",
}


class Cells(Protocol):
    """What a table says of each method under one heading."""

    def texts(self, rows: MethodRows, methods: Sequence[str]) -> list[str]:
        """One cell for each method; empty where it has no such figures."""


@dataclass(frozen=True)
class Means:
    """Means over the seeds of one figure or of several.

    Attributes:
        figures: their names.
        decimals: of each.
        joined: what stands between several.
        best: "highest" or "lowest" of the first figure stands out; None: no cell does.
        exact: whole numbers stand without decimals, so that 1 says of every seed what 1.00 does not.
    """

    figures: tuple[str, ...]
    decimals: int = 3
    joined: str = " / "
    best: str | None = None
    exact: bool = False

    def texts(self, rows: MethodRows, methods: Sequence[str]) -> list[str]:
        """As `Cells.texts`; a dash where the runs of a method have no such figure."""
        means = [[_mean(rows.get(method), figure) for figure in self.figures] for method in methods]
        firsts = [values[0] for values in means if values[0] is not None]
        bold = None
        if self.best and firsts:
            bold = self._text(max(firsts) if self.best == "highest" else min(firsts))
        texts = []
        for method, values in zip(methods, means, strict=True):
            found = [self._text(value) for value in values if value is not None]
            text = self.joined.join(found) or ("–" if method in rows else "")
            texts.append(f"**{text}**" if found and found[0] == bold else text)
        return texts

    def _text(self, value: float) -> str:
        decimals = 0 if self.exact and value == round(value) else self.decimals
        return f"{value:,.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Difference:
    """The paired difference of a figure to that of one method, with its 95 % interval.

    Attributes:
        figure: its name.
        to: the method.
        less: by how much less a method has, in place of how much more.
        decimals: of each number.
    """

    figure: str
    to: str
    less: bool = False
    decimals: int = 3

    def texts(self, rows: MethodRows, methods: Sequence[str]) -> list[str]:
        """As `Cells.texts`; the method that the others are compared with has an empty cell."""
        return [self._text(rows, method) for method in methods]

    def _text(self, rows: MethodRows, method: str) -> str:
        if method == self.to or method not in rows or self.to not in rows:
            return ""
        ours, theirs = rows[method].values(self.figure), rows[self.to].values(self.figure)
        sign = -1 if self.less else 1
        differences = [sign * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        found = interval(differences)
        if found is None:
            return ""
        numbers = [f"{value:.{self.decimals}f}".replace("-", "−") for value in (fmean(differences), *found)]
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


@dataclass(frozen=True)
class ResultTable:
    """A table of docs/results.md.

    Attributes:
        name: in the lines around it.
        task: whose rows it shows.
        methods: headings by method.
        cells: what is said of each, by heading.
        across: methods stand beside one another, not below.
        corner: heading of the headings.
        seeds: of which runs are shown, where rows that stand together were not all run on the same ones;
            None: all of them.
    """

    name: str
    task: str
    methods: Mapping[str, str]
    cells: Mapping[str, Cells]
    across: bool = True
    corner: str = ""
    seeds: tuple[int, ...] | None = None

    def text(self, rows: MethodRows) -> str:
        """Its Markdown, for the rows of its task."""
        if self.seeds is not None:
            rows = {name: _of_seeds(row, self.seeds) for name, row in rows.items()}
        found = {label: each.texts(rows, list(self.methods)) for label, each in self.cells.items()}
        lines = [[label, *texts] for label, texts in found.items()]
        heads = [self.corner, *self.methods.values()]
        if not self.across:
            heads = [self.corner, *found]
            columns = zip(*found.values(), strict=True)
            lines = [[label, *cells] for label, cells in zip(self.methods.values(), columns, strict=True)]
        ruler = "|" + "---|" * len(heads)
        return "\n".join([markdown_cells(heads), ruler, *map(markdown_cells, lines)]) + "\n"


def _of_seeds(row: MethodRow, seeds: Sequence[int]) -> MethodRow:
    return replace(row, figures={seed: row.figures[seed] for seed in seeds if seed in row.figures})


def _mean(row: MethodRow | None, figure: str) -> float | None:
    return None if row is None else row.mean(figure)


def _named(headings: Mapping[str, str], *methods: str) -> dict[str, str]:
    """The headings of some methods, in their order."""
    return {name: headings[name] for name in methods}


def _bits(figure: str) -> Means:
    return Means((figure,), best="lowest")


def _bins(language: str) -> Means:
    return Means(tuple(f"{language} bin {n}" for n in range(3)), decimals=2, exact=True)


def _documents(
    name: str, corner: str, methods: Mapping[str, str], seeds: tuple[int, ...] = _SIX
) -> ResultTable:
    """Readers of long documents; the first one is the window alone, with which the others are compared."""
    quarters = tuple(f"quarter {n}" for n in range(1, 5))
    cells: dict[str, Cells] = {
        "bits per byte": _bits("bits per byte"),
        "by quarter": Means(quarters, joined=", "),
        "of the window alone": Difference("bits per byte", next(iter(methods))),
        "seconds": Means(("seconds",), decimals=0),
    }
    return ResultTable(name, "longdoc", methods, cells, across=False, corner=corner, seeds=seeds)


TABLES = (
    ResultTable(
        "language",
        "language",
        MODELS,
        {
            "held-out text": _bits("bits_per_byte"),
            "WikiText-2, never seen": _bits("wikitext2"),
            "documents of 2,048 bytes, from the empty state": _bits("empty"),
            "… the state carried": _bits("carried"),
        },
    ),
    ResultTable(
        "ablations",
        "ablations",
        {
            "hope-full": "whole: DGD, momentum, retention, CMS of two levels, adaptive k, v, q",
            "hope-no-dgd": "gradient descent in place of DGD",
            "hope-no-momentum": "no momentum",
            "hope-no-retention": "no retention (weight decay)",
            "hope-no-cms": "one MLP of as many parameters in place of the CMS",
            "hope-static-k": "static k",
            "hope-static-v": "static v",
            "hope-static-q": "static q (the paper's Hope)",
        },
        {
            "bits per byte": _bits("bits_per_byte"),
            "less than the whole by": Difference("bits_per_byte", "hope-full", less=True),
        },
        across=False,
    ),
    ResultTable(
        "mechanism",
        "mechanism",
        {
            "mechanism-whole": "whole: k, v, η, α and targets generated, momentum, a CMS of two levels",
            "mechanism-static": "nothing generated",
            "mechanism-given-targets": "targets given",
            "mechanism-static-k-v": "static k and v",
            "mechanism-adaptive-q": "adaptive q as well",
            "mechanism-no-momentum": "no momentum",
            "mechanism-one-level": "one MLP of as many parameters in place of the CMS",
            "mechanism-linear": "exact linear memory, a matrix of as many numbers",
        },
        {
            "nats per byte": _bits("nats"),
            "less than the whole by": Difference("nats", "mechanism-whole", less=True),
            "parity, trained / longer": Means(("parity bin 0", "parity bin 1"), decimals=2, exact=True),
            "recall": Means(("recall",), best="highest"),
            "numbers of the state": Means(("state",), decimals=0),
        },
        across=False,
    ),
    ResultTable(
        "formal",
        "formal",
        {"lstm": "LSTM", **MODELS},
        {"parity": _bins("parity"), "(aa)*": _bins("(aa)*"), "aⁿbⁿ": _bins("a^n b^n")},
    ),
    ResultTable(
        "recall",
        "recall",
        {
            "transformer": "transformer",
            "transformer-convolved": "… behind a convolution",
            **MIXERS,
            "titans-dgd": "Titans by DGD",
        },
        {
            **{
                f"{pairs} pairs{'' if pairs <= 16 else ', more than trained'}": Means(
                    (f"accuracy@{pairs}",), best="highest"
                )
                for pairs in (4, 8, 16, 24, 32)
            },
            "keys told again": Means(("forgetting",), best="highest"),
            "… answered with the first value": Means(("stale",)),
            "state after 128 tokens, bytes": Means(("state bytes",), decimals=0),
            "parameters": Means(("parameters",), decimals=0),
        },
    ),
    ResultTable(
        "mad",
        "mad",
        _named(MODELS, "transformer", "linear-attention", "deltanet", "gated-deltanet", "titans", "hope"),
        {
            **{task: Means((task.replace(" ", "-"),), best="highest") for task in _SKILLS},
            "mean": Means(("accuracy",), best="highest"),
            "parameters": Means(("parameters",), decimals=0),
        },
    ),
    ResultTable(
        "needle",
        "needle",
        MODELS,
        {
            **{f"one key, {size:,}": Means((f"single_at_{size}",), best="highest") for size in _HAYSTACKS},
            **{f"all kinds, {size:,}": Means((f"exact_at_{size}",), best="highest") for size in _HAYSTACKS},
        },
        corner="bytes read",
    ),
    ResultTable(
        "babilong",
        "babilong",
        MODELS,
        {f"{words:,}": Means((f"exact_at_{words}",), best="highest") for words in (256, 1024, 4096)},
        corner="words read",
    ),
    ResultTable(
        "optimizers-digits",
        "optimizers-digits",
        {"adamw": "AdamW", "muon": "Muon", "m3": "M3"},
        {
            "training loss": Means(("training loss",), decimals=4, best="lowest"),
            "training loss, less than Muon's": Difference("training loss", "muon", less=True, decimals=4),
            "test loss": Means(("test loss",), best="lowest"),
            "test loss, less than Muon's": Difference("test loss", "muon", less=True),
            "test accuracy": Means(("test accuracy",), best="highest"),
        },
        across=False,
    ),
    ResultTable(
        "clinc150",
        "clinc150",
        {
            "no-adaptation": "no adaptation",
            "one-level": "one level",
            "two-levels-averaged": "two, the slow one an average that answers",
            "three-levels-averaged": "three, so",
            "two-levels-replay": "two, so, as many kept examples read again as new ones",
            "fine-tuning-averaged": "average of fine-tuned weights",
            "joint": "joint training on all domains",
            "class-means": "class means on frozen features",
            "kernel-lda": "Gaussian classes on random features",
        },
        {
            "accuracy": Means(("accuracy",), best="highest"),
            "more than joint training": Difference("accuracy", "joint"),
            "forgetting": Means(("forgetting",)),
        },
        across=False,
    ),
    _documents(
        "longdoc",
        "window of 1,024",
        {
            "window-1k": "alone",
            "window-2k": "a window of 2,048 alone",
            **_named(_READERS, "dynamic-evaluation"),
            "dynamic-evaluation-rms": "dynamic evaluation (RMS 1e-4)",
            "lora-reading": "LoRA of rank 8 (3e-3)",
            "rank-8-reading": "one level at rank 8 (Adam 4e-3)",
            "sparse-reading": "one level, sparse, 0.05 of the units a write (8e-4)",
            **_named(_READERS, "one-level-reading"),
            "rereading": "one level that takes each chunk twice (Adam 1e-4)",
            "distilled-reading": "one level, distilled at the end of a window (Adam 2e-4)",
            "started-reading": "one level with learned rates and starts",
            **_named(_READERS, "levels-average-reading"),
        },
    ),
    _documents(
        "longdoc-8k",
        "window of 8,192, the whole document",
        {
            "window-8k": "alone",
            "dynamic-evaluation-8k": _READERS["dynamic-evaluation"],
            "one-level-reading-8k": _READERS["one-level-reading"],
            **_named(_READERS, "levels-average-reading-8k"),
        },
    ),
    _documents(
        "longdoc-short",
        "all sixteen short documents",
        _named(_READERS, "window-1k", "dynamic-evaluation", "one-level-reading", "levels-average-reading"),
        _SHORT,
    ),
    _documents(
        "longdoc-short-8k",
        "all sixteen short documents",
        {
            **_named(_READERS, "window-8k"),
            "dynamic-evaluation-8k": _READERS["dynamic-evaluation"],
            **_named(_READERS, "levels-average-reading-8k"),
        },
        _SHORT,
    ),
    ResultTable(
        "longdoc-long",
        "longdoc",
        {
            **_named(_READERS, "window-1k", "dynamic-evaluation", "levels-average-reading", "window-8k"),
            "levels-average-reading-8k": f"{_TWO}, in 8,192 (2e-4)",
        },
        {
            "bits per byte": _bits("long"),
            "last quarter": Means(("long, last quarter",)),
            "of the first, over all twenty documents": Difference("bits per byte", "window-1k"),
            "of 8,192 alone, over all twenty": Difference("bits per byte", "window-8k"),
        },
        across=False,
        corner="the four long documents",
    ),
    ResultTable(
        "facts-8k",
        "facts-8k",
        {
            **_named(_LEARNERS, "no-adaptation", "context-2k", "context-8k", "fine-tuning", "lora"),
            **_named(_LEARNERS, "level-rank-8", "one-level", "level-replay", "level-averaged"),
            **_named(_LEARNERS, "retrieval-alone"),
            "retrieval-context": "retrieval, so, behind the last 2,048 tokens",
            **_named(_LEARNERS, "retrieval-level"),
        },
        {
            "told four times: cloze": Means(("cloze often",), best="highest"),
            "paraphrased": Means(("paraphrased often",), best="highest"),
            "damage, nats": Means(("damage often",)),
            "told once: cloze": Means(("cloze once",), best="highest"),
            "… paraphrased": Means(("paraphrased once",), best="highest"),
            "… damage": Means(("damage once",)),
        },
        across=False,
    ),
    ResultTable(
        "facts-32k",
        "facts-32k",
        {
            **_named(_LEARNERS, "no-adaptation", "context-2k", "context-8k", "fine-tuning", "lora"),
            **_named(_LEARNERS, "one-level", "level-replay", "retrieval-alone", "retrieval-level"),
            "retrieval-slow-level": "… at half the rate",
        },
        {
            "cloze": Means(("cloze often",), best="highest"),
            "paraphrased": Means(("paraphrased often",), best="highest"),
            "damage, nats": Means(("damage often",)),
        },
        across=False,
    ),
    ResultTable(
        "month",
        "month",
        {
            **_named(_LEARNERS, "no-adaptation"),
            "in-context": "the last 1,024 tokens as context",
            "retrieval-alone": f"{_LEARNERS['retrieval-alone']}, the best last",
            "retrieval-in-order": "… the newest last, as by `Learner.retrieve`",
            "fine-tuning-shared": "fine-tuning, one model for both users",
            "fine-tuning": "fine-tuning, a model for each",
            **_named(_LEARNERS, "lora", "one-level", "level-rank-8", "level-replay", "level-averaged"),
            "retrieval-level": "retrieval, the best last, over one level",
            "retrieval-slow-level": "… at a rate of 2e-4",
        },
        {
            "recall": Means(("recall",), best="highest"),
            "of what was corrected": Means(("correction",), best="highest"),
            "latest likelier than old": Means(("latest over old",)),
            "leak, nats": Means(("leak",)),
            "damage, nats": Means(("damage",)),
        },
        across=False,
    ),
)  # fmt: skip
