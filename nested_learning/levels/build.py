"""`levels`: from a model and an optimizer to their nested system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning._errors import kind_of, unknown
from nested_learning.continual.learner import Learner
from nested_learning.levels.components import NEVER, Component, Transfer, every_steps
from nested_learning.levels.describe.learners import describe_learner
from nested_learning.levels.describe.registry import (
    Described,
    DescribedMemory,
    DescribedWeights,
    describer_of,
)
from nested_learning.levels.describe.structure import find_attention, name_of_weights
from nested_learning.levels.drafts import Draft, Drafts
from nested_learning.levels.gradients import Trained, add_optimizers, as_optimizers, titles
from nested_learning.levels.order import in_levels
from nested_learning.levels.system import NestedSystem
from nested_learning.parts import parts

FROZEN = "none: frozen (requires_grad=False)"
UNTRAINED = "none: no optimizer trains it"


def levels(
    model: nn.Module | Learner, optimizer: Optimizer | Sequence[Optimizer] | None = None
) -> NestedSystem:
    """The nested system that a model and its optimizer are: memories by how often they are updated.

    Nothing is run. Modules are described by their class (`describes`) or, where there is no description, by
    their structure; optimizers likewise (`describes_optimizer`). The model may be on the meta device. A
    memory that an optimizer has begun to hold is measured; before, its bytes are what they will be once every
    parameter has had a gradient, or None for an optimizer that has no description.

    Args:
        model: any module, or a learner of `nested_learning.continual`: its base model and its levels.
        optimizer: the optimizer that trains it, or several (Muon and AdamW, say), each with some of the
            parameters. None: nothing is trained, weights change never.

    Raises:
        ValueError: no model, or no optimizer; an optimizer that trains no parameter of the model, or two that
            train the same one.
    """
    around: list[Described] = []
    if isinstance(model, Learner):
        base: nn.Module = model.model
        name, around = f"{type(base).__name__} that keeps learning", list(describe_learner(model))
    elif isinstance(model, nn.Module):
        base, name = model, type(model).__name__
    else:
        raise ValueError(
            f"expected a torch.nn.Module or a Learner, got {kind_of(model)}; make or load the model first "
            "(the command `nested-learning levels` takes the names of presets and folders)"
        )
    optimizers = as_optimizers(optimizer)
    drafts = Drafts(parts(base), {p: name for name, p in base.named_parameters()})
    trained = add_optimizers(drafts, optimizers, list(base.parameters()))
    walk = _Walk(base, drafts, trained, training=bool(optimizers))
    modules = dict(base.named_modules())
    walk.add_described("", around, place=len(modules))  # a learner's weights come after every memory
    for place, (where, module) in enumerate(modules.items(), 1):
        parent = modules[where.rpartition(".")[0]] if where else None
        walk.visit(where, module, parent, place)
    walk.connect()
    return NestedSystem(
        name=name,
        optimizer=titles(optimizers),
        levels=in_levels(drafts.components()),
        transfers=drafts.transfers(),
    )


_Found = dict[str, list[Draft]]  # drafts by the names in a description


def _named(found: _Found, names: Iterable[str], where: str) -> list[Draft]:
    for name in names:
        if name not in found:
            raise unknown(f"component in the description of module {where!r}:", name, found)
    return [draft for name in names for draft in found[name]]


class _Walk:
    """Drafts the memories and weights of a model, module by module."""

    def __init__(
        self, model: nn.Module, drafts: Drafts, trained: dict[Tensor, Trained], training: bool
    ) -> None:
        self.drafts, self.trained, self.training = drafts, trained, training
        self.claimed: set[nn.Parameter] = set()
        # By memory: its output, the place of the first module that has one, and the weights around it.
        self.outputs: dict[Draft, tuple[str, int, set[nn.Parameter]]] = {}
        # Transfers that descriptions name, each with its module and the drafts of that module's parts.
        self.given: list[tuple[str, Transfer, _Found]] = []
        self.besides_embeddings = {
            p
            for module in model.modules()
            if not isinstance(module, nn.Embedding)
            for p in module.parameters(recurse=False)
        }
        get_head = getattr(model, "get_output_embeddings", None)
        self.head = get_head() if callable(get_head) else None

    def visit(self, where: str, module: nn.Module, parent: nn.Module | None, place: int) -> None:
        """Draft a module's parts, described by class or structure, and the parameters that it holds itself.

        `place` counts modules in the order of their registration.
        """
        describe = describer_of(module)
        described = find_attention(module) if describe is None else describe(module)
        if described is not None:
            self.add_described(where, list(described), place)
        own = [p for p in module.parameters(recurse=False) if p not in self.claimed]
        if own:
            shared = any(p in self.besides_embeddings for p in own)
            name = name_of_weights(module, parent, module is self.head, shared)
            self._add_weights(where, name, own, place)

    def add_described(self, where: str, parts: list[Described], place: int) -> None:
        """Draft the described parts of the module called `where`."""
        found: _Found = {}
        memories = [part for part in parts if isinstance(part, DescribedMemory)]
        for memory in memories:
            found[memory.name] = [self._add_memory(where, memory)]
        for memory in memories:
            needed = _named(found, memory.needs, where)
            found[memory.name][0].needs.update(dict.fromkeys(needed))
        around: set[nn.Parameter] = set()
        for part in parts:
            if isinstance(part, DescribedWeights):
                free = [p for p in part.parameters if p not in self.claimed]
                around.update(free)
                found[part.name] = self._add_weights(where, part.name, free, place)
                starting = _named(found, part.initial_of, where)
                reading = _named(found, part.generates, where)
                self._connect_weights(found[part.name], starting, reading)
        for part in parts:
            if isinstance(part, Transfer):
                self.given.append((where, part, found))
        for memory in memories:
            if memory.output:
                (draft,) = found[memory.name]
                _, since, before = self.outputs.get(draft, ("", place, set()))
                self.outputs[draft] = memory.output, since, before | around

    def _connect_weights(self, made: list[Draft], starting: list[Draft], reading: list[Draft]) -> None:
        for draft in made:
            learned = draft.component.frequency != NEVER
            start = "meta-learned initial state" if learned else "initial state"
            self.drafts.add_pass([draft], starting, "initial state", start)
            self.drafts.add_pass([draft], reading, "generation of context", "projections of its input")
            if learned:
                through = [*starting, *reading]
                self.drafts.add_pass(through, [draft], "backpropagation", "gradient through reads and writes")

    def _add_memory(self, where: str, memory: DescribedMemory) -> Draft:
        static = memory.frequency.unit == "step" and not self.training
        component = Component(
            name=memory.name,
            kind="memory",
            frequency=NEVER if static else memory.frequency,
            state_per=memory.state_per,
            context=memory.context,
            objective=memory.objective,
            rule=memory.rule,
        )
        draft = self.drafts.add(component, memory.state_bytes, measured=False)
        draft.where[where] = None
        return draft

    def _add_weights(
        self, where: str, name: str, parameters: Iterable[nn.Parameter], place: int
    ) -> list[Draft]:
        """Draft the parameters as one component per frequency."""
        made: dict[Draft, None] = {}
        for parameter in parameters:
            if parameter in self.claimed:  # named twice by one description
                continue
            self.claimed.add(parameter)
            trained = self.trained.get(parameter) if parameter.requires_grad else None
            component = Component(
                name=name,
                kind="weights",
                frequency=every_steps(trained.period) if trained else NEVER,
                context="training batches" if trained else "none",
                objective="the training loss" if trained else "none",
            )
            draft = self.drafts.add(component, parameter.nbytes, measured=True)
            draft.where[where] = None
            draft.parameters[parameter] = None
            draft.last_seen = place
            if trained:
                draft.rules[trained.step] = None
                draft.needs.update(dict.fromkeys(trained.needs))
            else:
                draft.rules[UNTRAINED if parameter.requires_grad else FROZEN] = None
            made[draft] = None
        return list(made)

    def connect(self) -> None:
        """Draft what passes: described transfers, gradients, steps, memories' output to later weights."""
        everywhere = self.drafts.by_name()
        for where, transfer, found in self.given:
            sources, targets = (
                _named({**everywhere, **found}, names, where)
                for names in (transfer.sources, transfer.targets)
            )
            self.drafts.add_pass(sources, targets, transfer.kind, transfer.what)
        weights = self.drafts.weights
        for draft in weights:
            for how in [self.trained[p] for p in draft.parameters if p in self.trained]:
                self.drafts.add_pass([draft], how.fed, "generation of context", "gradients")
                self.drafts.add_pass(how.reads, [draft], "conditioning on output", "the step")
        for memory, (output, since, around) in self.outputs.items():
            after = [
                draft
                for draft in weights
                if draft.last_seen > since
                and draft.component.name != "embedding"
                and not around.issuperset(draft.parameters)
            ]
            self.drafts.add_pass([memory], after, "conditioning on output", output)
