from __future__ import annotations

import threading

import pytest
import torch

from nested_learning.memory import check

MEMORIES = ("k", "v", "memory")


def finite() -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor | None]]:
    signals = {"k": torch.ones(2, 4, 8, 3), "eta": torch.ones(2, 4, 8), "log_mu": None}
    weights = {"W1": torch.ones(2, 3, 4, 5, 5), "momentum W1": None, "W2": torch.ones(2, 3, 4, 5, 5)}
    return signals, weights


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_switch(monkeypatch, value, expected):
    monkeypatch.setenv(check.VARIABLE, value)
    assert check.enabled() is expected
    monkeypatch.delenv(check.VARIABLE)
    assert check.enabled() is False


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch):
    monkeypatch.setenv(check.VARIABLE, "maybe")
    with pytest.raises(ValueError, match=r"NESTED_LEARNING_CHECK must be 1 .* got 'maybe'"):
        check.enabled()


def test_finite_values_pass():
    check.check_step(MEMORIES, 0, *finite())
    check.check_values("input", x=torch.zeros(2, 3), state=None, mask=torch.ones(2, 3, dtype=torch.bool))


def test_compiled_code_is_not_checked(monkeypatch):
    monkeypatch.setenv(check.VARIABLE, "1")
    double = torch.compile(lambda x: 2 * x if check.enabled() else x, backend="eager", fullgraph=True)
    assert double(torch.ones(1)).item() == 1


def test_the_first_memory_chunk_and_row_are_named():
    signals, weights = finite()
    weights["W2"][1, 1, 0, 2, 2] = float("inf")
    weights["W2"][1, 2] = float("nan")  # of a later memory
    with (
        check.layer_name("model.layers.3"),
        check.layer_name("mixer"),
        pytest.raises(FloatingPointError) as caught,
    ):
        check.check_step(MEMORIES, 17, signals, weights)
    assert str(caught.value) == (
        "layer 'model.layers.3.mixer' has infinity in W2 of memory 'v', chunk 17: "
        "1 of 200 entries, the first in row 1 of the batch"
    )


def test_signals_come_before_weights_and_both_kinds_are_told():
    signals, weights = finite()
    signals["eta"][0, 1, 2], signals["eta"][1, 0, 0] = float("nan"), float("-inf")
    weights["W1"].fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"a layer has NaN and infinity in eta of chunk 2: 2 of 64 entries.*row 0"
    ):
        check.check_step(MEMORIES, 2, signals, weights)


def test_inputs_are_named():
    with (
        check.layer_name("first"),
        pytest.raises(FloatingPointError, match="'first' has NaN in its input x: 1 of 6"),
    ):
        check.check_values("input", x=torch.tensor([[0.0, 1.0, 2.0], [3.0, float("nan"), 5.0]]))


def test_names_end_with_their_block_and_do_not_reach_other_threads():
    seen: list[str] = []

    def fail() -> None:
        try:
            check.check_values("input", x=torch.full((1,), float("nan")))
        except FloatingPointError as error:
            seen.append(str(error))

    with check.layer_name("here"):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    fail()
    assert [message.split(" has ")[0] for message in seen] == ["a layer", "a layer"]


def test_weights_need_the_memory_axis():
    signals, weights = finite()
    weights["W1"] = torch.ones(2, 5, 5)
    with pytest.raises(ValueError, match=r"W1 must be \[B, 3, ...\].*k/v/memory, got \(2, 5, 5\)"):
        check.check_step(MEMORIES, 0, signals, weights)


def test_a_model_names_the_layer_the_memory_and_the_chunk(monkeypatch):
    """A weight of one memory overflows in the second block: the message says where it was met first."""
    from nested_learning import HopeConfig, HopeForCausalLM

    options = {"self_modifying_titans": {"chunk_size": 4}}
    config = HopeConfig(
        vocab_size=20,
        hidden_size=16,
        num_heads=2,
        num_hidden_layers=2,
        mixer_options=options,
        cms_levels=[{"chunk_size": 4}],
    )
    torch.manual_seed(0)
    model = HopeForCausalLM(config)
    ids = torch.randint(0, 20, (2, 11))
    plain = model(ids).logits
    monkeypatch.setenv(check.VARIABLE, "1")
    torch.testing.assert_close(model(ids).logits, plain)
    with torch.no_grad():
        model.model.layers[1].mixer.initial["W1"][1, 0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mixer.*chunk 0"):
        model(ids)
    model.model.layers[1].mixer.initial["W1"].data.zero_()
    with pytest.raises(FloatingPointError, match=r"model\.layers\.0\.mixer.* in its input x"):
        model(inputs_embeds=torch.full((1, 3, 16), float("nan")))
