"""Parts of a model by short handles, such as `cms.0`, `initial`, `embedding`, which modules give themselves.

A module names the parts of which it is made in a method that any class may have:

    class FastWeights(nn.Module):
        def part_names(self):
            return {"start": "initial", "key_value": "projections"}

The keys are names of parameters or modules inside of it, "" for all that no other key names, the values
handles. A value that ends in a colon, `{"mixer": "titans:"}`, names the kind of what lies there: what that
says of itself comes after it, as in `titans.projections`, without it where all in a model are of one kind.
Where two modules name one parameter the outer one counts. A method `part_chunks`, from handles to tokens,
says how many tokens a part's chunk has. Parameters that no module names belong to `embedding`, to the `head`
of a transformers model, to `norms`, or to the path of their module in the layer, as `self_attn.q_proj`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from nested_learning._errors import unknown

EMBEDDING, HEAD, NORMS = "embedding", "head", "norms"


@dataclass(frozen=True)
class Parts:
    """The parts of a model.

    Attributes:
        handles: handle of each parameter by its name, in the order of `named_parameters`.
        chunks: tokens of a chunk, by handle, of the parts that have one.
        tied_head: whether the model's head is its embedding, so that there is no part `head`.
    """

    handles: Mapping[str, str]
    chunks: Mapping[str, int]
    tied_head: bool = False

    def at_depth(self, depth: int | None = None) -> dict[str, list[str]]:
        """Names of parameters by the first `depth` words of their handle (None: all): a partition of all."""
        found: dict[str, list[str]] = {}
        for name, handle in self.handles.items():
            found.setdefault(".".join(handle.split(".")[:depth]), []).append(name)
        return found

    def find(self, part: str) -> list[str]:
        """Names of the parameters of a part.

        Args:
            part: a handle, its first words (`cms`), the path of a module or parameter (`model.layers.0`, also
                without the outermost name), or a glob of one of the two (`*.gates`, `model.layers.*.cms`).

        Raises:
            ValueError: there is no such part.
        """
        for spoken in (self.handles.values(), self.handles.keys()):
            found = [
                name for name, words in zip(self.handles, spoken, strict=True) if _is_within(words, part)
            ]
            if found:
                return found
        if part == HEAD and self.tied_head:
            raise ValueError(
                "this model's head is tied to its embedding: one matrix, which belongs to the part "
                "'embedding'. Name that."
            )
        known = {*self.at_depth(1), *self.at_depth()}
        raise ValueError(
            f"{unknown('part of the model', part, known)} A module's path and a glob are parts too."
        )

    def cover(self, names: Iterable[str]) -> list[str]:
        """The shortest handles whose parts together have these parameters; all of a part for some of it."""
        wanted = set(names)
        chosen: dict[str, None] = {}
        for name in self.handles:
            if name in wanted:
                words = self.handles[name].split(".")
                prefixes = [".".join(words[:count]) for count in range(1, len(words) + 1)]
                whole = (each for each in prefixes if wanted.issuperset(self._beneath[each]))
                chosen[next(whole, prefixes[-1])] = None
        return list(chosen)

    @cached_property
    def _beneath(self) -> dict[str, list[str]]:
        """Names of parameters by handle and by the first words of handles."""
        found: dict[str, list[str]] = {}
        for depth in range(1, 1 + max((h.count(".") + 1 for h in self.handles.values()), default=1)):
            found |= self.at_depth(depth)
        return found

    def chunk(self, part: str) -> int | None:
        """Tokens of the chunk that all of a part has; None where it has none, or several."""
        sizes = {self.chunks.get(self.handles[name]) for name in self.find(part)}
        return sizes.pop() if len(sizes) == 1 else None


def parts(model: nn.Module) -> Parts:
    """The parts of a model; see the module's docstring.

    Raises:
        ValueError: two modules give one part chunks of different lengths.
    """
    modules = dict(model.named_modules())
    said = {
        path: dict(module.part_names())
        for path, module in modules.items()
        if callable(getattr(type(module), "part_names", None))
    }
    head = _head(model)
    given: dict[str, tuple[str, str]] = {}
    for name, _ in model.named_parameters():
        kind, handle = _said_of(name, said)
        given[name] = kind, handle or kind or _by_structure(name, modules, head)
    kinds = {kind for kind, _ in given.values() if kind}
    several = len(kinds) > 1
    handles = {
        name: f"{kind}.{handle}" if several and kind and handle != kind else handle
        for name, (kind, handle) in given.items()
    }
    embedded = {p for m in modules.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tied = head is not None and any(p in embedded for p in head.parameters())
    return Parts(handles, _chunks(modules, said, several), tied)


def _said_of(name: str, said: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """(kind, handle) that the modules around a parameter give it, each empty where none does."""
    kind = ""
    for path, local in _paths(name):
        names = said.get(path, {})
        fitting = [key for key in names if not key or local == key or local.startswith(f"{key}.")]
        if fitting:
            handle = names[max(fitting, key=len)]
            if not handle.endswith(":"):
                return kind, handle
            kind = handle[:-1]
    return kind, ""


def _paths(name: str) -> Iterator[tuple[str, str]]:
    """(path of a module, name of the parameter in it), from the whole model to the parameter's own module."""
    yield "", name
    for end, letter in enumerate(name):
        if letter == ".":
            yield name[:end], name[end + 1 :]


def _is_within(name: str, part: str) -> bool:
    """Whether a dotted name is the part, or begins with it, or with what a glob stands for.

    The outermost word of a parameter's path, that of the model in its wrapper, may be left out.
    """
    shorter = name.partition(".")[2]
    if not set(part) & set("*?["):
        return any(f"{each}.".startswith(f"{part}.") for each in (name, shorter) if each)
    return any(fnmatch.fnmatchcase(each, f"{part}{end}") for each in (name, shorter) for end in ("", ".*"))


def _head(model: nn.Module) -> nn.Module | None:
    for module in model.modules():  # in a wrapper, such as DDP's, the model is inside
        get_head = getattr(module, "get_output_embeddings", None)
        if callable(get_head):
            found = get_head()
            return found if isinstance(found, nn.Module) else None
    return None


def _by_structure(name: str, modules: Mapping[str, nn.Module], head: nn.Module | None) -> str:
    """Handle of a parameter of which no module speaks."""
    path, _, local = name.rpartition(".")
    module = modules[path]
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if module is head:
        return HEAD
    if "Norm" in type(module).__name__ and not any(True for _ in module.children()):
        return NORMS
    words = path.split(".") if path else []
    layer = next((place for place, word in enumerate(words) if word.isdigit()), None)
    inside = [word for word in words[layer + 1 :] if not word.isdigit()] if layer is not None else words
    if inside:
        return ".".join(inside)
    return local if any(True for _ in module.children()) or not path else path


def _chunks(
    modules: Mapping[str, nn.Module], said: Mapping[str, Mapping[str, str]], several: bool
) -> dict[str, int]:
    """Tokens of a chunk by handle; with `several` kinds the kind comes first."""
    found: dict[str, int] = {}
    for path, module in modules.items():
        if callable(getattr(type(module), "part_chunks", None)):
            kind = _said_of(path, said)[0] if several else ""
            spoken: Mapping[str, int] = module.part_chunks()  # type: ignore[operator]
            for handle, tokens in spoken.items():
                handle = f"{kind}.{handle}" if kind else handle
                if found.setdefault(handle, tokens) != tokens:
                    raise ValueError(
                        f"part {handle!r} has chunks of {found[handle]} tokens elsewhere and of {tokens} in "
                        f"{path!r}; give the two handles of their own"
                    )
    return found
