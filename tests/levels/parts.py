"""What tests compare of a description: its levels, and what passes between them."""


def outline(system):
    """[(frequency, {name: parameters}), …] of all levels."""
    return [
        (str(level.frequency), {component.name: component.parameters for component in level.components})
        for level in system.levels
    ]


def passes(system, kind):
    """{(source, target)} of one kind."""
    return {
        (source, target)
        for transfer in system.transfers
        if transfer.kind == kind
        for source in transfer.sources
        for target in transfer.targets
    }
