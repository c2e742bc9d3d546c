"""A nested system as a Mermaid flowchart."""

from __future__ import annotations

from nested_learning.levels.system import Level, NestedSystem
from nested_learning.levels.text import gathered, state_text

# What Mermaid would read as markup inside of a quoted label, as its entity codes. The ampersand comes first.
_ENTITIES = {"&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "`": "#96;"}


def to_mermaid(system: NestedSystem) -> str:
    """A box per level, the fastest on top, and arrows for what passes.

    An arrow ends at a level's box where it would end at all components in it.
    """
    ids = {component.name: f"c{number}" for number, component in enumerate(system.components)}
    lines = ["flowchart TB"]
    for level in system.levels:
        lines.append(f'  subgraph L{level.number}["{_label(f"Level {level.number}: {level.frequency}")}"]')
        for component in level.components:
            parts = [component.name, f"state {state_text(component)}"]
            if component.parameters:
                parts.insert(1, f"{component.parameters:,} parameters")
            lines.append(f'    {ids[component.name]}["{"<br/>".join(map(_label, parts))}"]')
        lines.append("  end")
    for transfer in system.transfers:
        label = _label(f"{transfer.kind}: {transfer.what}")
        sources = _nodes(gathered(system, transfer.sources, transfer.targets), ids)
        targets = _nodes(gathered(system, transfer.targets, transfer.sources), ids)
        lines.append(f'  {sources} -->|"{label}"| {targets}')
    return "\n".join(lines) + "\n"


def _nodes(ends: list[str | Level], ids: dict[str, str]) -> str:
    """`c1 & c2`: an arrow from or to each."""
    return " & ".join(ids[end] if isinstance(end, str) else f"L{end.number}" for end in ends)


def _label(text: str) -> str:
    for character, entity in _ENTITIES.items():
        text = text.replace(character, entity)
    return text
