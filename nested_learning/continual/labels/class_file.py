"""Files of classifiers: sums over examples, written whole, and checked before they are taken over."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from nested_learning._tensor_files import check_whole, listed, read_tensors, write_tensors
from nested_learning.continual.files import to_json
from nested_learning.continual.labels.class_head import ClassHead, ClassSums, HeadSettings, RandomFeatures

FORMAT, VERSION = "nested_learning.classifier", "1"


def write_head(path: str | os.PathLike[str], head: ClassHead, identity: Mapping[str, str]) -> None:
    """Write a head; `identity` is what a classifier must agree with to read it again."""
    tensors: dict[str, Tensor] = {}
    labels: list[str] = []
    if head.sums is not None:
        labels = head.sums.labels
        tensors |= {"counts": head.sums.counts, "means": head.sums.means, "scatter": head.sums.scatter}
    if head.mapped is not None:
        tensors |= {name: getattr(head.mapped, name) for name in RandomFeatures.__dataclass_fields__}
    if head.waiting is not None:
        tensors["waiting"] = head.waiting
    metadata = {"format": FORMAT, "version": VERSION, "labels": to_json(labels)}
    metadata["waiting_labels"] = to_json(head.waiting_labels)
    write_tensors(path, tensors, {**metadata, **identity})


def read_head(
    path: str | os.PathLike[str], settings: HeadSettings, width: int, identity: Mapping[str, str]
) -> ClassHead:
    """The head of a file.

    Args:
        path: path of a file that `write_head` wrote.
        settings: settings of the classifier that reads it.
        width: width of its model, D.
        identity: all that the file must agree with.

    Raises:
        FileNotFoundError, ValueError: see `Classifier.load`.
    """
    name = os.fspath(path)
    tensors, metadata = read_tensors(path, "classifier")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{name} is a safetensors file, but not that of a classifier")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{name} has format version {metadata.get('version')!r}, this package reads {VERSION!r}"
        )
    for key, value in identity.items():
        if metadata.get(key) != value:
            what = "on another base model" if key == "fingerprint" else f"with other {key}"
            theirs = str(metadata.get(key))[:200]
            raise ValueError(f"{name} is of a classifier {what}: {theirs}; this one has {value[:200]}")
    try:
        check_whole(tensors, metadata)
        return _head(tensors, metadata, settings, width)
    except (KeyError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{name} is damaged: {why}") from error


def _head(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], settings: HeadSettings, width: int
) -> ClassHead:
    labels, waiting = listed(metadata["labels"]), listed(metadata["waiting_labels"])
    head = ClassHead(settings, waiting_labels=waiting)
    is_kernel = settings.kind == "kernel lda"
    size = settings.width if is_kernel else width
    expected: dict[str, tuple[int, ...]] = {}
    if labels:
        square = () if settings.kind == "means" else (size, size)
        expected = {"counts": (len(labels),), "means": (len(labels), size), "scatter": square}
        if is_kernel:
            expected |= {"centre": (width,), "scale": (width,), "weights": (width, size), "phases": (size,)}
    if waiting:
        expected["waiting"] = (len(waiting), width)
        if labels or not is_kernel or len(waiting) >= settings.first:
            raise ValueError(f"it holds {len(waiting)} examples, where none should wait")
    if len(set(labels)) != len(labels) or set(tensors) != set(expected):
        raise ValueError(f"it has labels {labels}"[:200] + f" and tensors {sorted(tensors)}")
    for name, shape in expected.items():
        kind = torch.int64 if name == "counts" else torch.float64
        tensor = tensors[name]
        if tensor.dtype != kind or tuple(tensor.shape) != shape or not tensor.isfinite().all():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected finite {kind} of {shape}"
            )
    if labels:
        if int(tensors["counts"].min()) < 1 or (is_kernel and not (tensors["scale"] > 0).all()):
            raise ValueError("a label has no examples, or a feature no scale")
        head.sums = ClassSums(labels, tensors["counts"], tensors["means"], tensors["scatter"])
        if is_kernel:
            fields = {name: tensors[name] for name in RandomFeatures.__dataclass_fields__}
            head.mapped = RandomFeatures(**fields)
    head.waiting = tensors.get("waiting")
    if head.labels:
        _check_solvable(head)
    return head


def _check_solvable(head: ClassHead) -> None:
    """Raise ValueError for sums whose scatter is none."""
    try:
        found = head.means_whitened()
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"its scatter is no sum of squares ({error})") from error
    if not found.isfinite().all():
        raise ValueError("its numbers are too large")
