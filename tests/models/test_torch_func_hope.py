"""Gradients of each row by torch.func, as differential privacy and influence functions take them."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.ecosystem.tiny_hope import LEARNING, hope, ids, slow_but


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("recompute", [None, "chunk"])
@pytest.mark.parametrize("case", slow_but())
def test_gradients_of_all_rows_at_once_are_those_of_each_row(case, recompute):
    if recompute and (case in LEARNING or "attention" in case):
        pytest.skip("one case of each engine")
    model = hope(case, recompute=recompute)
    text = ids(3, 11)
    mask = torch.ones_like(text)
    mask[1, :4], mask[2, 5:] = 0, 0

    def loss(parameters, text, mask):
        inputs = {"input_ids": text[None], "labels": text[None], "attention_mask": mask[None]}
        return functional_call(model, parameters, kwargs=inputs).loss

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    together = vmap(grad(loss), (None, 0, 0))(parameters, text, mask)
    for row in range(3):
        rows = slice(row, row + 1)
        model.zero_grad()
        model(text[rows], labels=text[rows], attention_mask=mask[rows]).loss.backward()
        for name, p in model.named_parameters():
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(together[name][row], wanted, rtol=1e-8, atol=1e-12)


def test_checks_of_the_input_stay_outside_of_transforms():
    model = hope("deltanet")
    wrong = torch.full((2, 3), 31)
    with pytest.raises(ValueError, match="token ids must lie in"):
        model(wrong)
    with pytest.raises(ValueError, match="labels must lie in"):
        model(ids(2, 3), labels=wrong)
