"""Class means and linear discriminant analysis on given features, also on random Fourier features of them.

Sums over examples are all that is kept, so a class may come at any time, in any order, and nothing is
forgotten. In float64: means and the scatter around them are updated by differences (Chan, Golub and LeVeque
1979), without the cancellation of sums of squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nested_learning.optimizers.checks import COUNT, POSITIVE, Bound, Choice

KINDS = ("means", "lda", "kernel lda")
PART = Bound(high=1.0, open_low=True)
SEED = Bound(integer=True)


@dataclass(frozen=True)
class HeadSettings:
    """Settings of a `ClassHead`.

    Args:
        kind: "means", the nearest class mean; "lda", by the Mahalanobis distance of the covariance that all
            classes share (linear discriminant analysis with equal priors); "kernel lda", the same on random
            Fourier features, which approximate a Gaussian kernel (arXiv 2412.15571).
        shrinkage: share of the identity times mean variance in the covariance; above 0, and with 1 "lda" is
            "means".
        width: number of the random features.
        bandwidth: σ of the Gaussian kernel, in units of the median distance between the first examples.
        first: number of examples, in the order in which they come, from which scale and median distance are
            taken. They are kept until there are so many, and dropped then.
        seed: seed of the random features.

    Raises:
        ValueError: a value is out of its range.
    """

    kind: str = "lda"
    shrinkage: float = 0.1
    width: int = 2048
    bandwidth: float = 1.0
    first: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        Choice(KINDS).check("kind", self.kind)
        PART.check("shrinkage", self.shrinkage)
        COUNT.check("width", self.width)
        POSITIVE.check("bandwidth", self.bandwidth)
        COUNT.check("first", self.first)
        SEED.check("seed", self.seed)


@dataclass
class ClassSums:
    """Sums over examples x [D] of classes, float64.

    Attributes:
        labels: the classes in the order in which they came.
        counts: number of examples of each [C].
        means: mean of each [C, D].
        scatter: Σ (x − mean of its class) (x − …)ᵀ over all examples [D, D], or its trace [] alone.
    """

    labels: list[str]
    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def new(cls, size: int, whole: bool) -> ClassSums:
        """Empty sums over features [size]; `whole`: the scatter is a matrix."""
        scatter = torch.zeros((size, size) if whole else (), dtype=torch.float64, device="cpu")
        return cls([], scatter.new_zeros(0, dtype=torch.int64), scatter.new_zeros(0, size), scatter)

    def add(self, x: Tensor, labels: Sequence[str]) -> None:
        """Add examples [n, D] with their labels."""
        for label in dict.fromkeys(labels):
            own = x[[place for place, each in enumerate(labels) if each == label]]
            if label not in self.labels:
                self.labels.append(label)
                self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])
                self.means = torch.cat([self.means, self.means.new_zeros(1, x.shape[1])])
            place = self.labels.index(label)
            before, new, mean = int(self.counts[place]), len(own), own.mean(0)
            step = mean - self.means[place]
            self._scatter(own - mean, 1.0)
            if before:
                self._scatter(step[None], before * new / (before + new))
            self.means[place] += step * (new / (before + new))
            self.counts[place] += new

    def _scatter(self, x: Tensor, weight: float) -> None:
        self.scatter = self.scatter + weight * (x.T @ x if self.scatter.ndim else x.square().sum())

    def covariance(self, shrinkage: float) -> Tensor:
        """Shared covariance [D, D], shrunk towards the identity times its mean variance.

        The identity itself where no class has two different examples.
        """
        size = self.means.shape[1]
        identity = torch.eye(size, dtype=torch.float64, device="cpu")
        shared = self.scatter / max(int(self.counts.sum()), 1)
        if not self.scatter.ndim:
            variance = shared / size
            return identity * variance if variance > 0 else identity
        scale = shared.diagonal().mean()
        return (1 - shrinkage) * shared + shrinkage * scale * identity if scale > 0 else identity


@dataclass
class RandomFeatures:
    """Random Fourier features √(2/m) cos(W (x − centre)/scale + b) of features x [D].

    Their products approximate exp(−‖u − v‖²/2σ²) of the scaled features u, v (Rahimi and Recht 2007).

    Attributes:
        centre, scale: [D].
        weights: W, [D, m], drawn from a Gaussian of standard deviation 1/σ.
        phases: b, [m], drawn from 0 to 2π.
    """

    centre: Tensor
    scale: Tensor
    weights: Tensor
    phases: Tensor

    @classmethod
    def fitted(cls, x: Tensor, settings: HeadSettings) -> RandomFeatures:
        """Random features for examples like x [n, D]: scaled to variance 1, σ by their median distance."""
        centre, scale = x.mean(0), x.std(0, correction=0)
        scale = scale.where(scale > 0, 1.0)
        scaled = (x - centre) / scale
        distances = torch.pdist(scaled)
        median = float(distances.median()) if len(distances) else 0.0
        sigma = settings.bandwidth * (median if median > 0 else 1.0)
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        size = (x.shape[1], settings.width)
        kind: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        weights = torch.randn(size, **kind) / sigma
        phases = torch.rand(settings.width, **kind) * 2 * math.pi
        return cls(centre, scale, weights, phases)

    def of(self, x: Tensor) -> Tensor:
        """Random features [n, m] of x [n, D]."""
        angles = (x - self.centre) / self.scale @ self.weights + self.phases
        return angles.cos() * (2 / len(self.phases)) ** 0.5


@dataclass
class ClassHead:
    """Labels for features [D], learned one after the other.

    Attributes:
        settings: settings.
        sums: sums over examples; None before the first.
        mapped: random features of "kernel lda", once they are fixed.
        waiting: the first examples [n, D], until there are `settings.first`; "kernel lda" alone.
        waiting_labels: their labels.
    """

    settings: HeadSettings
    sums: ClassSums | None = None
    mapped: RandomFeatures | None = None
    waiting: Tensor | None = None
    waiting_labels: list[str] = field(default_factory=list)
    _solved: tuple[RandomFeatures | None, Tensor, Tensor] | None = None

    @property
    def labels(self) -> list[str]:
        """Labels in the order in which they came first."""
        return list(dict.fromkeys([*(self.sums.labels if self.sums else ()), *self.waiting_labels]))

    def learn(self, x: Tensor, labels: Sequence[str]) -> None:
        """Learn examples [n, D], float64, with their labels."""
        self._solved = None
        if self.settings.kind == "kernel lda" and self.mapped is None:
            room = self.settings.first - len(self.waiting_labels)
            early = x[:room]
            self.waiting = early if self.waiting is None else torch.cat([self.waiting, early])
            self.waiting_labels += labels[:room]
            x, labels = x[room:], labels[room:]
            if len(self.waiting_labels) < self.settings.first:
                return
            self.mapped, self.sums = self._early()
            self.waiting, self.waiting_labels = None, []
        if not len(x):
            return
        x = x if self.mapped is None else self.mapped.of(x)
        if self.sums is None:
            self.sums = ClassSums.new(x.shape[1], whole=self.settings.kind != "means")
        self.sums.add(x, labels)

    def _early(self) -> tuple[RandomFeatures, ClassSums]:
        """Random features fitted to the examples that wait, and these as sums."""
        assert self.waiting is not None
        mapped = RandomFeatures.fitted(self.waiting, self.settings)
        sums = ClassSums.new(self.settings.width, whole=True)
        sums.add(mapped.of(self.waiting), self.waiting_labels)
        return mapped, sums

    def scores(self, x: Tensor) -> Tensor:
        """Logarithms of the Gaussian densities [n, C] of features [n, D], up to a constant: softmax gives
        the probabilities of the classes, all equally frequent. Columns in the order of `labels`.

        Raises:
            ValueError: nothing was learned yet.
        """
        if not self.labels:
            raise ValueError("no label was learned yet: give examples to `learn` first")
        mapped, root, means = self._solution()
        x = x if mapped is None else mapped.of(x)
        whitened = torch.linalg.solve_triangular(root, x.T, upper=False).T
        return torch.cdist(whitened, means).square() * -0.5

    def means_whitened(self) -> Tensor:
        """Means [C, D] in the coordinates in which the shared covariance is the identity."""
        return self._solution()[2]

    def _solution(self) -> tuple[RandomFeatures | None, Tensor, Tensor]:
        """Random features, Cholesky factor of the covariance, and the means that it whitens."""
        if self._solved is None:
            mapped, sums = (self.mapped, self.sums) if self.sums is not None else self._early()
            assert sums is not None
            root = torch.linalg.cholesky(sums.covariance(self.settings.shrinkage))
            means = torch.linalg.solve_triangular(root, sums.means.T, upper=False).T
            self._solved = mapped, root, means
        return self._solved
