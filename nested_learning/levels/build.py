"""`levels`: from a model and an optimizer to their nested system."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.levels.optimizers import rules_of
from nested_learning.levels.registry import (
    Described,
    GradientMemory,
    Memory,
    OptimizerRule,
    Weights,
    describer_of,
)
from nested_learning.levels.structure import find_attention, name_of_weights
from nested_learning.levels.system import (
    NEVER,
    Component,
    Frequency,
    NestedSystem,
    Transfer,
    TransferKind,
    every_steps,
    in_levels,
)
from nested_learning.optimizers.base import tensor_bytes

FROZEN = "none: frozen (requires_grad=False)"
UNTRAINED = "none: no optimizer trains it"


def levels(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> NestedSystem:
    """The nested system that a model and its optimizer are: memories by how often they are updated.

    Nothing is run. Modules are described by their class (`describes`) or, where there is no description, by
    their structure; the same holds for optimizers (`describes_optimizer`). The model may be on the meta
    device. An optimizer that has stepped has its state measured; before, its bytes are what they will be
    once every parameter has had a gradient, or None for an optimizer that has no description.

    Args:
        model: any module.
        optimizer: that trains it, or several (Muon and AdamW, say), each with some of the parameters. None:
            nothing is trained, weights change never.

    Raises:
        ValueError: an optimizer that trains no parameter of the model, or two that train the same one.
    """
    optimizers = _optimizers(optimizer)
    system = _Builder(model, optimizers)
    for name, module, parent in _with_parents(model):
        system.add_module(name, module, parent)
    system.connect()
    return NestedSystem(
        name=type(model).__name__,
        optimizer=" and ".join(type(one).__name__ for one in optimizers) or "none",
        levels=in_levels(system.components()),
        transfers=tuple(_merged(system.transfers)),
    )


def _optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    given = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for one in given:
        if not isinstance(one, Optimizer):
            raise ValueError(f"expected torch optimizers or None, got {type(one).__name__}")
    # accelerate's wrapper, which the Trainer has, is an optimizer around an optimizer
    wrapped = [getattr(one, "optimizer", None) for one in given]
    return [inner if isinstance(inner, Optimizer) else one for one, inner in zip(given, wrapped, strict=True)]


def _with_parents(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """(name, module, the module around it), parents before children, in the order of registration."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        yield name, module, modules[name.rpartition(".")[0]] if name else None


@dataclass(eq=False)
class _Draft:
    """A component before it has a unique name."""

    component: Component
    where: list[str] = field(default_factory=list)
    needs: dict[_Draft, None] = field(default_factory=dict)
    members: dict[nn.Parameter, None] = field(default_factory=dict)  # of weights
    last_seen: int = 0  # by weights: the index of the module that registered the last of them

    def add_bytes(self, count: int | None) -> None:
        before = self.component.state_bytes
        total = None if count is None or before is None else before + count
        self.component = dataclasses.replace(self.component, state_bytes=total)


@dataclass(frozen=True)
class _Trained:
    """What an optimizer does with a parameter."""

    rule: OptimizerRule
    needs: tuple[_Draft, ...]  # memories that take part in its step
    reads: tuple[_Draft, ...]  # those that the step reads itself
    fed: tuple[_Draft, ...]  # those that its gradient goes to


class _Builder:
    """Collects drafts of components and what passes between them."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        self.drafts: dict[object, _Draft] = {}
        self.passes: dict[tuple[_Draft, _Draft, TransferKind, str], None] = {}
        self.claimed: set[nn.Parameter] = set()
        self.outputs: dict[_Draft, tuple[str, int, set[nn.Parameter]]] = {}
        self.training = bool(optimizers)
        self.index = 0
        self.uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
        get_head = getattr(model, "get_output_embeddings", None)
        self.head = get_head() if callable(get_head) else None
        self.trained: dict[Tensor, _Trained] = {}
        for optimizer in optimizers:
            self._add_optimizer(optimizer, set(self.uses))

    # -- optimizers

    def _add_optimizer(self, optimizer: Optimizer, parameters: set[nn.Parameter]) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        if not parameters.intersection(own):
            raise ValueError(
                f"{type(optimizer).__name__} trains none of the model's {len(parameters)} parameters: build "
                "it from this model's parameters()"
            )
        if any(p in self.trained for p in own):
            raise ValueError(f"{type(optimizer).__name__} trains parameters of another of the optimizers")
        states = _states(optimizer)
        stepped = _has_stepped(states)
        found = 0
        for group in optimizer.param_groups:
            for rule in rules_of(optimizer, group):
                drafts: dict[str, _Draft] = {}
                for memory in rule.memories:
                    measured = _held(states, rule.params, memory.keys) if stepped else None
                    drafts[memory.name] = self._add_gradient_memory(optimizer, memory, measured)
                    found += measured or 0
                self._connect_rule(rule, drafts)
        self._add_rest(optimizer, states, found)

    def _connect_rule(self, rule: OptimizerRule, drafts: dict[str, _Draft]) -> None:
        needed_by_others = {name for memory in rule.memories for name in memory.needs}
        for memory in rule.memories:
            needed = [drafts[name] for name in memory.needs]
            drafts[memory.name].needs.update(dict.fromkeys(needed))
            self._pass(needed, [drafts[memory.name]], "conditioning on output", "its output")
        trained = _Trained(
            rule,
            needs=tuple(drafts.values()),
            reads=tuple(drafts[m.name] for m in rule.memories if m.name not in needed_by_others),
            fed=tuple(drafts[m.name] for m in rule.memories if m.reads_gradients),
        )
        self.trained.update(dict.fromkeys(rule.params, trained))

    def _add_gradient_memory(
        self, optimizer: Optimizer, memory: GradientMemory, measured: int | None
    ) -> _Draft:
        component = Component(
            name=f"{type(optimizer).__name__}: {memory.name}",
            kind="optimizer",
            frequency=NEVER if memory.every is None else every_steps(memory.every),
            state_bytes=0,
            measured=measured is not None,
            context=memory.context,
            objective=memory.objective,
            rule=memory.rule,
        )
        draft = self._draft(component)
        draft.add_bytes(memory.state_bytes if measured is None else measured)
        both = draft.component.measured and component.measured
        draft.component = dataclasses.replace(draft.component, measured=both)
        return draft

    def _add_rest(
        self, optimizer: Optimizer, states: list[dict[Tensor, dict[str, object]]], found: int
    ) -> None:
        """State that no rule accounts for, such as that of parameters frozen since."""
        held = sum(tensor_bytes(state) for by_parameter in states for state in by_parameter.values())
        if _has_stepped(states) and held > found:
            memory = GradientMemory(
                name="other state", keys=(), state_bytes=None, objective="unknown", rule="unknown"
            )
            self._add_gradient_memory(optimizer, memory, held - found)

    # -- modules

    def add_module(self, name: str, module: nn.Module, parent: nn.Module | None) -> None:
        """Describe a module, by class or structure, and the parameters it holds itself."""
        self.index += 1
        describe = describer_of(module)
        described = find_attention(module) if describe is None else describe(module)
        if described is not None:
            self._add_described(name, described)
        own = [p for p in module.parameters(recurse=False) if p not in self.claimed]
        if own:
            shared = any(self.uses[p] > 1 for p in own)
            kind = name_of_weights(module, parent, module is self.head, shared)
            self._add_weights(name, kind, own)

    def _add_described(self, where: str, described: Iterable[Described]) -> None:
        parts = list(described)
        drafts: dict[str, list[_Draft]] = defaultdict(list)
        memories = [part for part in parts if isinstance(part, Memory)]
        weights = [part for part in parts if isinstance(part, Weights)]
        for memory in memories:
            drafts[memory.name] = [self._add_memory(where, memory)]
        for memory in memories:
            (draft,) = drafts[memory.name]
            draft.needs.update((other, None) for name in memory.needs for other in drafts[name])
        taken: set[nn.Parameter] = set()
        for entry in weights:
            free = [p for p in entry.parameters if p not in self.claimed]
            taken.update(free)
            drafts[entry.name] = self._add_weights(where, entry.name, free)
            self._connect_weights(drafts[entry.name], entry, drafts)
        for part in parts:
            if isinstance(part, Transfer):
                sources = [draft for name in part.sources for draft in drafts[name]]
                targets = [draft for name in part.targets for draft in drafts[name]]
                self._pass(sources, targets, part.kind, part.what)
        for memory in memories:
            (draft,) = drafts[memory.name]
            output, since, inside = self.outputs.get(draft, (memory.output, self.index, set()))
            if memory.output:
                self.outputs[draft] = output, since, inside | taken

    def _connect_weights(self, made: list[_Draft], part: Weights, drafts: dict[str, list[_Draft]]) -> None:
        fed = {
            "initial state": [draft for name in part.initial_of for draft in drafts[name]],
            "generation of context": [draft for name in part.generates for draft in drafts[name]],
        }
        for draft in made:
            learned = draft.component.frequency != NEVER
            start = "meta-learned initial state" if learned else "initial state"
            self._pass([draft], fed["initial state"], "initial state", start)
            self._pass(
                [draft], fed["generation of context"], "generation of context", "projections of its input"
            )
            if learned:
                through = [*fed["initial state"], *fed["generation of context"]]
                self._pass(through, [draft], "backpropagation", "gradient through its reads and writes")

    def _add_memory(self, where: str, memory: Memory) -> _Draft:
        static = memory.frequency.unit == "step" and not self.training
        component = Component(
            name=memory.name,
            kind="memory",
            frequency=NEVER if static else memory.frequency,
            state_bytes=0,
            state_per=memory.state_per,
            context=memory.context,
            objective=memory.objective,
            rule=memory.rule,
        )
        draft = self._draft(component)
        draft.where.append(where)
        draft.add_bytes(memory.state_bytes)
        return draft

    def _add_weights(self, where: str, name: str, parameters: list[nn.Parameter]) -> list[_Draft]:
        """The parameters as one component per frequency."""
        made: dict[_Draft, None] = {}
        for parameter in parameters:
            if parameter in self.claimed:
                continue
            self.claimed.add(parameter)
            trained = self.trained.get(parameter)
            frequency, rule = _training_of(parameter, trained)
            draft = self.drafts.setdefault(
                ("weights", name, frequency),
                _Draft(
                    Component(name=name, kind="weights", frequency=frequency, state_bytes=0, measured=True)
                ),
            )
            draft.members[parameter] = None
            draft.last_seen = self.index
            draft.add_bytes(parameter.nbytes)
            rules = dict.fromkeys([*draft.component.rule.split("; "), rule])
            draft.component = dataclasses.replace(
                draft.component,
                parameters=draft.component.parameters + parameter.numel(),
                context="training batches" if frequency != NEVER else "none",
                objective="the training loss" if frequency != NEVER else "none",
                rule="; ".join(filter(None, rules)),
            )
            if where not in draft.where:
                draft.where.append(where)
            if trained is not None and frequency != NEVER:
                draft.needs.update(dict.fromkeys(trained.needs))
            made[draft] = None
        return list(made)

    # -- results

    def connect(self) -> None:
        """What passes between optimizers and weights, and from memories to the weights after them."""
        weights = [draft for draft in self.drafts.values() if draft.component.kind == "weights"]
        for draft in weights:
            for parameter in draft.members:
                trained = self.trained.get(parameter)
                if trained is not None and draft.component.frequency != NEVER:
                    self._pass([draft], trained.fed, "generation of context", "gradients")
                    self._pass(trained.reads, [draft], "conditioning on output", "the step")
        for memory, (output, since, inside) in self.outputs.items():
            after = [
                draft
                for draft in weights
                if draft.last_seen > since
                and draft.component.name != "embedding"
                and not inside.issuperset(draft.members)
            ]
            self._pass([memory], after, "conditioning on output", output)

    def components(self) -> list[Component]:
        """With unique names: memories and weights in the order of the modules, optimizers first."""
        names = self._names()
        return [
            dataclasses.replace(
                draft.component,
                name=names[draft],
                where=tuple(draft.where),
                needs=tuple(names[other] for other in draft.needs),
            )
            for draft in self.drafts.values()
        ]

    @property
    def transfers(self) -> list[tuple[str, str, TransferKind, str]]:
        """(source, target, kind, what)."""
        names = self._names()
        return [(names[a], names[b], kind, what) for a, b, kind, what in self.passes]

    def _names(self) -> dict[_Draft, str]:
        """Where a name is not unique, its components get their frequencies, and then numbers, behind it."""
        counts = Counter(draft.component.name for draft in self.drafts.values())
        taken: Counter[str] = Counter()
        names = {}
        for draft in self.drafts.values():
            name = draft.component.name
            if counts[name] > 1:
                name = f"{name}, {draft.component.frequency}"
            taken[name] += 1
            names[draft] = name if taken[name] == 1 else f"{name} ({taken[name]})"
        return names

    def _draft(self, component: Component) -> _Draft:
        """The draft of a component that differs from this one in its bytes at most."""
        return self.drafts.setdefault(dataclasses.replace(component, measured=False), _Draft(component))

    def _pass(
        self, sources: Iterable[_Draft], targets: Sequence[_Draft], kind: TransferKind, what: str
    ) -> None:
        for source in sources:
            self.passes.update(((source, target, kind, what), None) for target in targets)


def _training_of(parameter: nn.Parameter, trained: _Trained | None) -> tuple[Frequency, str]:
    if not parameter.requires_grad:
        return NEVER, FROZEN
    if trained is None:
        return NEVER, UNTRAINED
    return every_steps(trained.rule.period), trained.rule.step


def _states(optimizer: Optimizer) -> list[dict[Tensor, dict[str, object]]]:
    """The optimizer's state by parameter, and that of the one inside it."""
    inner = getattr(optimizer, "inner", None)
    return [dict(optimizer.state)] + (_states(inner) if isinstance(inner, Optimizer) else [])


def _has_stepped(states: list[dict[Tensor, dict[str, object]]]) -> bool:
    """Whether there is any state but preconditioners that were given, which are there from the start."""
    return any(set(state) - {"given"} for by_parameter in states for state in by_parameter.values())


def _held(
    states: list[dict[Tensor, dict[str, object]]], params: Sequence[Tensor], keys: tuple[str, ...]
) -> int:
    found = [by_parameter[p] for by_parameter in states for p in params if p in by_parameter]
    return sum(tensor_bytes(state[key]) for state in found for key in keys if key in state)


def _merged(pairs: list[tuple[str, str, TransferKind, str]]) -> Iterator[Transfer]:
    """Pairs as transfers from several to several, where every source reaches every target."""
    targets: dict[tuple[str, TransferKind, str], dict[str, None]] = defaultdict(dict)
    for source, target, kind, what in pairs:
        targets[source, kind, what][target] = None
    sources: dict[tuple[frozenset[str], TransferKind, str], list[str]] = defaultdict(list)
    order: dict[frozenset[str], tuple[str, ...]] = {}
    for (source, kind, what), reached in targets.items():
        every = frozenset(reached)
        order.setdefault(every, tuple(reached))
        sources[every, kind, what].append(source)
    for (every, kind, what), named in sources.items():
        yield Transfer(sources=tuple(named), targets=order[every], kind=kind, what=what)
