"""Levels of a pretrained model that learns."""

import torch

from nested_learning import (
    continual,
)
from nested_learning.continual import stack_levels
from nested_learning.levels import levels
from tests.continual.tiny_models import random_ids, tiny_model
from tests.levels.parts import outline, passes


class TestLearner:
    """A pretrained model with levels: `nested_learning.continual`."""

    def learner(self):
        return stack_levels(
            tiny_model(layers=4),
            levels=[
                continual.Level(4, 0.1, rule="adam"),
                continual.Level(16, 0.2, layers=[2, 3], gate_quantile=0.3, decay=0.1),
                continual.Level(64, 0.0, layers=[1, 2], consolidate=0.5),
            ],
        )

    def test_levels(self):
        one, three = 3 * 16 * 24, [3 * 16 * 24] * 3
        system = levels(self.learner())
        assert system.name == "LlamaForCausalLM that keeps learning"
        assert outline(system) == [
            ("∞ (non-parametric)", {"softmax attention": 0}),
            ("every 4 tokens", {"Δ1 (chunk 4)": 0}),
            ("every 16 tokens", {"Δ2 (chunk 16)": 0}),
            ("every 64 tokens", {"Δ3 (chunk 64)": 0}),
            (
                "never",
                {
                    "weights under Δ1": one,
                    "weights under Δ1, Δ3": three[0],
                    "weights under Δ1, Δ2, Δ3": three[1],
                    "weights under Δ1, Δ2": three[2],
                    "embedding": 61 * 16,
                    "attention projections": 4 * (2 * 16 * 16 + 2 * 16 * 8),
                    "norms": 9 * 16,
                    "head": 61 * 16,
                },
            ),
        ]
        assert system["Δ2 (chunk 16)"].rule == (
            "gd, lr 0.2 (eq 71); clipped to norm 1; where the loss exceeds the running quantile 0.3; "
            "decay 0.1 towards the base"
        )
        assert system["Δ3 (chunk 64)"].rule == "writes nothing itself (lr 0)"

    def test_what_passes(self):
        system = levels(self.learner())
        assert passes(system, "generation of weights") == {("Δ2 (chunk 16)", "Δ3 (chunk 64)")}
        names = [f"Δ{n} (chunk {size})" for n, size in ((1, 4), (2, 16), (3, 64))]
        learning = names[:2]
        assert passes(system, "conditioning on weights") == {
            (source, target) for target in learning for source in names if source != target
        }
        assert ("weights under Δ1, Δ3", "Δ3 (chunk 64)") in passes(system, "initial state")
        assert ("softmax attention", "weights under Δ1") in passes(system, "conditioning on output")

    def test_state_bytes_are_what_it_holds(self):
        slower = [continual.Level(16, 0.2, layers=[2, 3]), continual.Level(64, 0.1, rank=2, rule="momentum")]
        learner = stack_levels(tiny_model(layers=4), levels=[continual.Level(4, 0.1, rule="adam"), *slower])
        learner.observe(random_ids(127))  # all have written, and the sums of the slower ones have begun
        rows = [state.tensors() for state in learner.memory.rows[0].levels]
        held = [sum(t.nbytes for t in tensors if t.ndim) for tensors in rows]  # without counters
        system = levels(learner)
        assert [component.state_bytes for component in system.components if component.name[0] == "Δ"] == held

    def test_with_an_optimizer_of_the_base(self):
        learner = self.learner()
        system = levels(learner, torch.optim.AdamW(learner.model.parameters()))
        assert str(system["weights under Δ1"].frequency) == "every optimizer step"
        assert ("AdamW: moments", "weights under Δ1") in passes(system, "conditioning on output")
