"""Continuum memory systems: MLP blocks, each with its own update frequency (eq 70-74)."""

from nested_learning.layers.cms.block import MLPBlock
from nested_learning.layers.cms.level import CMSLevel, parse_levels
from nested_learning.layers.cms.system import ContinuumMemorySystem
from nested_learning.layers.cms.writer import CMSState

__all__ = ["CMSLevel", "CMSState", "ContinuumMemorySystem", "MLPBlock", "parse_levels"]
