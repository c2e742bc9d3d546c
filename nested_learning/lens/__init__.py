"""A lens on what a model learns: one page, and pictures, of a text that it reads.

lens(model, text, tokenizer) in a notebook; `nested-learning lens MODEL --text FILE` writes the page.
"""

from nested_learning.layers.memory.watch import MemoryTrace
from nested_learning.lens.figures import save_figures
from nested_learning.lens.look import lens
from nested_learning.lens.of_learner import record_learner
from nested_learning.lens.page import page
from nested_learning.lens.record import record
from nested_learning.lens.recording import Recording
from nested_learning.lens.traces import LearnedTrace, LevelTrace, Prediction, Traces

__all__ = [
    "LearnedTrace",
    "LevelTrace",
    "MemoryTrace",
    "Prediction",
    "Recording",
    "Traces",
    "lens",
    "page",
    "record",
    "record_learner",
    "save_figures",
]
