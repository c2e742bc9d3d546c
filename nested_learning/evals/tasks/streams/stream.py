"""Class-incremental learning: labelled texts, stage after stage; a query does not tell its stage.

A stage is a set of labels and training examples of each, seen once; a query is labelled by the most probable
of all labels seen so far. Accuracy is measured on queries that are asked at the end. Some of each class are
asked after every stage too, for forgetting (mean of the best accuracy of a stage before the end, minus that
at the end) and backward transfer. "right task" is the share of queries that get a label of their own stage,
right or wrong; "last task" the share that get one of the stage learned last (there is as much of each).

Each method gets the setting with the best accuracy on validation queries at the end of a shorter stream that
is not reported; then the seeds decide stages, their order, examples and queries (from the test split).
Whatever is trained learns from the labels' tokens: fine-tuning, EWC, replay and joint training in batches of
8 examples, levels at every 128 tokens, which are about as many. One level answers as it is; of two or three
averaged ones the slowest answers, which every 512 or 2,048 tokens takes over a share of the next faster one
and so is an average of what that one was ("averaged" fine-tuning has an average too). With replay two
levels keep every example, and each write of the fast one goes over kept ones too, labels in turn; the method
"replay" keeps two examples of each label. Three levels that are not averaged all learn and answer together.
"joint" has all stages at once, shuffled.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nested_learning.evals.claims import Ahead, Claim, Reaches
from nested_learning.evals.data_files import MADE_UP
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import (
    PretrainedMethod,
    Teaching,
    load_base,
)
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.methods.pretrained.features import DEPTHS
from nested_learning.evals.methods.pretrained.method import (
    CLASS_MEANS,
    EWC,
    FINE_TUNING,
    FINE_TUNING_AVERAGED,
    IN_CONTEXT,
    JOINT,
    KERNEL_LDA,
    NO_ADAPTATION,
    ONE_LEVEL,
    REPLAY,
    RETRIEVAL,
    THREE_LEVELS,
    THREE_LEVELS_AVERAGED,
    THREE_LEVELS_IN_CONTEXT,
    TWO_LEVELS_AVERAGED,
    TWO_LEVELS_REPLAY,
)
from nested_learning.evals.of_pretrained import OfPretrained
from nested_learning.evals.report.figures import draw_bars, new_figure, save
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.streams.data import LabelledTexts, StreamProtocol, draw, merged
from nested_learning.evals.tasks.streams.scores import final_accuracy, learn_in_turn
from nested_learning.evals.tasks.streams.wording import Wording

BATCH = 8  # examples of a step of fine-tuning
RATES = (3e-5, 1e-4, 3e-4)
METHODS = (
    NO_ADAPTATION,
    IN_CONTEXT,
    RETRIEVAL,
    FINE_TUNING,
    FINE_TUNING_AVERAGED,
    EWC,
    REPLAY,
    CLASS_MEANS,
    KERNEL_LDA,
    ONE_LEVEL,
    TWO_LEVELS_AVERAGED,
    TWO_LEVELS_REPLAY,
    THREE_LEVELS_AVERAGED,
    THREE_LEVELS,
    THREE_LEVELS_IN_CONTEXT,
    JOINT,
)


@dataclass(frozen=True)
class StreamOptions:
    """Model, texts and numbers of them.

    Args:
        model: "smollm2", "random", a folder, or a name on the hub that is downloaded.
        data: where the texts come from; see the task.
        tasks: stages in sequence.
        train: examples of each class.
        queries: queries of each class, asked when all stages are learned.
        between: those of them that are asked after every stage too.
        tuning_tasks: stages in the sequence that a method is tuned on, at most `tasks`.
        validation: queries of each class there; they come from the validation split.
        chunks: tokens between two writes of the levels, fast to slow: 128 are about 7 examples of CLINC150.
        window: tokens of examples in the context.
        settings: how many of the settings of each method are tried; 0: all.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    model: str = PACKAGED
    data: str = ""
    tasks: int = 5
    train: int = 20
    queries: int = 2
    between: int = 1
    tuning_tasks: int = 3
    validation: int = 2
    chunks: tuple[int, int, int] = (128, 512, 2048)
    window: int = 6144
    settings: int = 0
    seeds: int = 3
    tuning_seeds: int = 1

    @property
    def protocol(self) -> StreamProtocol:
        """Share of the texts that is used."""
        return StreamProtocol(
            tasks=self.tasks,
            train=self.train,
            queries=self.queries,
            between=self.between,
            tuning_tasks=self.tuning_tasks,
            validation=self.validation,
        )


SMOKE = StreamOptions(
    model=RANDOM,
    data=MADE_UP,
    tasks=2,
    train=3,
    queries=2,
    chunks=(64, 128, 256),
    window=256,
    settings=1,
    seeds=1,
)


def settings_of(name: str) -> list[dict[str, Any]]:
    """The settings that a method may choose from, in the order in which they are tried."""
    three = [{"lr": rate, "consolidate": [0.2, share]} for rate in (0.6, 1.0) for share in (0.2, 0.4)]
    three += [
        {"lr": 1.0, "consolidate": [0.2, 0.8]},
        {"lr": 1.0, "consolidate": [0.4, 0.4]},
        {"lr": 1.5, "consolidate": [0.4, 0.4]},
    ]
    penalties = [{"lr": lr, "strength": strength} for lr in RATES[1:] for strength in (1e3, 1e5)]
    penalties += [{"lr": lr, "strength": strength} for lr in (3e-4, 1e-3) for strength in (1e6, 1e7)]
    grids: dict[str, list[dict[str, Any]]] = {
        "no-adaptation": [{}],
        "in-context": [{"kept": kept, "order": order} for kept in (1, 2) for order in ("stream", "mixed")],
        "retrieval": [{"examples": count, "depth": depth} for count in (4, 16) for depth in DEPTHS[:2]],
        "fine-tuning": [{"lr": lr} for lr in RATES],
        "fine-tuning-averaged": [{"lr": lr, "average": share} for lr in RATES[1:] for share in (0.05, 0.1)],
        "lora": [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3)],
        "ewc": penalties,
        "replay": [{"lr": lr} for lr in RATES[1:]],
        "class-means": [
            {"depth": depth, "pooling": pooling, "shrinkage": shrinkage}
            for depth in DEPTHS
            for pooling in ("mean", "last")
            for shrinkage in (0.1, 0.5)
        ],
        "kernel-lda": [
            {"depth": depth, "pooling": "mean", "shrinkage": shrinkage, "bandwidth": bandwidth}
            for depth in DEPTHS[:2]
            for shrinkage in (0.01, 0.1)
            for bandwidth in (1.0, 2.0)
        ],
        "one-level": [{"lr": lr, "share": 1.0} for lr in (0.3, 0.6, 1.0, 1.5)],
        "two-levels": [{"lr": lr, "share": share} for lr in (0.6, 1.0) for share in (1.0, 0.25)],
        "three-levels": [{"lr": lr, "share": share} for lr in (0.6, 1.0) for share in (1.0, 0.25)],
        "two-levels-averaged": [
            {"lr": lr, "consolidate": [share]} for lr in (0.6, 1.0) for share in (0.05, 0.1)
        ],
        "two-levels-replay": [{"lr": lr, "consolidate": [0.1], "replayed": 0.5} for lr in (0.6, 1.0)],
        "three-levels-averaged": three,
        "three-levels-in-context": three[:4:2],
        "joint": [{"lr": lr} for lr in RATES[1:]],
    }
    return grids.get(name, [{}])


class StreamTask(OfPretrained[StreamOptions]):
    """Labelled texts are learned in stages; queries are labelled among all labels seen."""

    columns: ClassVar[Mapping[str, str]] = {
        "accuracy": "share of right labels at the end, among all labels, without a stage being told",
        "forgetting": "best accuracy of a stage before the end, minus that at the end; mean",
        "backward transfer": "accuracy of a stage at the end, minus that right after it; mean",
        "right task": "share of queries that get a label of their own stage",
        "last task": "share of queries that get a label of the last stage",
        "seconds": "of learning",
    }
    headline = "accuracy"
    chosen = METHODS

    @abstractmethod
    def texts(self, seed: int) -> LabelledTexts:
        """The labelled texts, and which labels make a stage."""

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        found = settings_of(method.name)
        return found[: self.options.settings] if self.options.settings else found

    def missing(self) -> str | None:
        if problem := super().missing():
            return problem
        try:
            self.texts(0)
        except ValueError as error:
            return str(error)
        return None

    def teaching(self) -> Teaching:
        """Circumstances of all methods: what is trained are the MLPs' weights, which levels learn too."""
        return Teaching(self.chunks, self.options.window, weights="mlp", examples=BATCH)

    def run(self, method: Method, seed: int) -> Figures:
        return self._learn(method, seed, tuning=False)

    def tune(self, method: Method, seed: int) -> Figures:
        """Accuracy on validation queries at the end of a shorter stream."""
        return self._learn(method, seed, tuning=True)

    def _learn(self, method: Method, seed: int, tuning: bool) -> Figures:
        assert isinstance(method, PretrainedMethod)
        stages = draw(self.texts(seed), self.options.protocol, seed, tuning)
        if method.name == JOINT.name:
            stages = [merged(stages, seed)]
        base = load_base(self.options.model)
        wording = Wording(base)
        with method.open(base, self.teaching(), seed) as student:
            if tuning:
                return {"accuracy": final_accuracy(student, wording, stages)}
            return {**learn_in_turn(student, wording, stages), "parameters": base.parameters}

    def constants(self) -> Mapping[str, Figures]:
        stages = draw(self.texts(0), self.options.protocol, 0, tuning=False)
        share = 1 / len(stages)
        accuracy = 1 / sum(len(stage.labels) for stage in stages)
        return {"chance": {"accuracy": accuracy, "right task": share, "last task": share}}

    def claims(self) -> Sequence[Claim]:
        chance = None if self.missing() else self.constants()["chance"]["accuracy"]

        def ahead(text: str, *order: str) -> Ahead:
            return Ahead(text, "Fig. 6", "accuracy", order, chance=chance)

        three, two, one = (m.name for m in (THREE_LEVELS_AVERAGED, TWO_LEVELS_AVERAGED, ONE_LEVEL))
        both = THREE_LEVELS_IN_CONTEXT.name
        return [
            ahead("(7) more levels are more accurate in the end: three, two, one", three, two, one),
            Ahead(
                "(7) more levels forget less: three, two, one",
                "Fig. 6",
                "forgetting",
                (three, two, one),
                False,
            ),
            ahead("(7) three levels are ahead of one level", three, one),
            ahead("three levels are ahead of in-context learning", three, IN_CONTEXT.name),
            ahead("three levels are ahead of EWC", three, EWC.name),
            ahead("three levels are ahead of class means (InCA's kind)", three, CLASS_MEANS.name),
            ahead("three levels and a context are ahead of a context alone", both, IN_CONTEXT.name),
            *self._targets(),
        ]

    def _targets(self) -> list[Claim]:
        """What levels are to reach beside what is used instead; not claims of the paper."""

        def ahead(text: str, better: Method, worse: Method, margin: float = 0.0) -> Claim:
            return Ahead(text, "ours", "accuracy", (better.name, worse.name), margin=margin)

        kept, forgetting = TWO_LEVELS_REPLAY, {"forgetting": 0.03}
        return [
            ahead("levels with replay are not 0.01 below joint training", kept, JOINT, -0.01),
            Reaches("levels with replay forget 0.03 at most", "ours", kept.name, forgetting, higher=False),
            *(
                ahead(f"{each.name} are ahead of averaged fine-tuning", each, FINE_TUNING_AVERAGED)
                for each in (TWO_LEVELS_AVERAGED, THREE_LEVELS_AVERAGED)
            ),
            *(
                Reaches(f"{each.name} of frozen features reach 0.92", "ours", each.name, {"accuracy": 0.92})
                for each in (CLASS_MEANS, KERNEL_LDA)
            ),
        ]

    def note(self) -> str:
        options = self.options
        text = (
            f"{options.tasks} tasks, {options.train} examples and {options.queries} queries of each class, "
            f"one pass, no task identity; settings are chosen on {self.tuned_on()} over "
            f"{options.tuning_tasks} tasks. Numbers beside are those of Llama 3B after continued training, "
            "read off Fig. 6 by others and not verified, with class means beside InCA and three averaged "
            "levels beside Hope."
        )
        return " ".join([text, *self.remarks()])

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Final accuracy of each method, and accuracy over the stages so far while they are learned."""
        figure, (final, so_far) = new_figure(2, width=5.0, height=4.0)
        draw_bars(final, rows, "accuracy")
        final.set(xlabel="final accuracy, all labels", xlim=(0, 1))
        for row in rows.values():
            matrices = [figures["matrix"] for figures in row.figures.values() if "matrix" in figures]
            if matrices and len(matrices[0]) > 1:
                curves = [[sum(after) / len(after) for after in matrix] for matrix in matrices]
                means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                so_far.plot(range(1, len(means) + 1), means, marker=".", label=row.method)
        so_far.set(xlabel="tasks learned", ylabel="mean accuracy of the tasks so far", ylim=(0, 1))
        figure.legend(*so_far.get_legend_handles_labels(), loc="outside right center", fontsize=7)
        save(figure, path)
