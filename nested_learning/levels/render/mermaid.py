"""A nested system as a Mermaid flowchart."""

from __future__ import annotations

from collections.abc import Sequence

from nested_learning.levels.components import DescribedLevel, Transfer
from nested_learning.levels.render.labels import End, ends, state_label

# Characters that Mermaid would read as markup inside of a quoted label, as its entity codes; the ampersand
# comes first.
_ENTITIES = {"&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "`": "#96;"}


def to_mermaid(levels: Sequence[DescribedLevel], transfers: Sequence[Transfer]) -> str:
    """A box per level, the fastest on top, and arrows for what passes.

    An arrow ends at a level's box where it would end at all components in it.
    """
    components = [component for level in levels for component in level.components]
    ids = {component.name: f"c{number}" for number, component in enumerate(components)}
    lines = ["flowchart TB"]
    for level in levels:
        lines.append(f'  subgraph L{level.number}["{_escaped(f"Level {level.number}: {level.frequency}")}"]')
        for component in level.components:
            parts = [component.name, f"state {state_label(component)}"]
            if component.parameters:
                parts.insert(1, f"{component.parameters:,} parameters")
            lines.append(f'    {ids[component.name]}["{"<br/>".join(map(_escaped, parts))}"]')
        lines.append("  end")
    for transfer in transfers:
        label = _escaped(f"{transfer.kind}: {transfer.what}")
        sources, targets = (_nodes(side, ids) for side in ends(transfer, levels))
        lines.append(f'  {sources} -->|"{label}"| {targets}')
    return "\n".join(lines) + "\n"


def _nodes(side: list[End], ids: dict[str, str]) -> str:
    """`c1 & c2`: an arrow from or to each."""
    return " & ".join(ids[end] if isinstance(end, str) else f"L{end.number}" for end in side)


def _escaped(text: str) -> str:
    for character, entity in _ENTITIES.items():
        text = text.replace(character, entity)
    return text
