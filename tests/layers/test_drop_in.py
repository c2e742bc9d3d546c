"""Drop-in layers in a small Llama of transformers and in a plain network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nested_learning.layers import SelfModifyingLinear, carry_states, replace_linears
from nested_learning.layers.drop_in import DropInLinear

MODES = ["normalised", "literal"]


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(1))


def let_it_learn(model: nn.Module) -> None:
    """Away from the start, where the layers change nothing."""
    torch.manual_seed(2)
    for layer in model.modules():
        if isinstance(layer, DropInLinear):
            nn.init.normal_(layer.value_up)
            if layer.read_scale is not None:
                nn.init.ones_(layer.read_scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_keeps_its_logits_exactly_then_trains(mode, dtype):
    model, ids = llama(dtype), tokens(2, 20)
    before = model(ids).logits
    replaced = replace_linears(
        model, ["*.down_proj", "model.layers.1.self_attn.o_proj"], mode=mode, chunk_size=8
    )
    assert replaced == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert torch.equal(model(ids).logits, before)
    if dtype == torch.bfloat16:
        return

    fresh = [p for name, p in model.named_parameters() if name.endswith(("value_up", "read_scale"))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    starting = [p.detach().clone() for p in fresh]
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all((p - start).abs().max() > 1e-3 for p, start in zip(fresh, starting, strict=True))
    assert model(ids).logits.isfinite().all()


def test_learns_in_context_what_no_layer_without_state_can():
    """Each row draws from three of 16 tokens at random: only what the row has read tells which.

    Knowing the last token alone, the best loss is (ln 3)/3 + (2/3) ln 22.5 = 2.44.
    """
    torch.manual_seed(0)
    parts = [nn.Embedding(16, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 16)]
    network = nn.Sequential(*parts)
    replace_linears(network, "3")
    optimizer, g, losses = (
        torch.optim.AdamW(network.parameters(), lr=1e-2),
        torch.Generator().manual_seed(0),
        [],
    )
    for _ in range(300):
        drawn = torch.rand(8, 16, generator=g).argsort(1)[:, :3]
        ids = drawn.gather(1, torch.randint(0, 3, (8, 33), generator=g))
        logits = network(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 2.34


def test_carried_states_and_a_cache_equal_the_whole_sequence():
    model, ids = llama(torch.float64), tokens(2, 20)
    replace_linears(model, "*.down_proj", chunk_size=8)
    let_it_learn(model)
    whole = model(ids).logits
    with carry_states(model) as first:
        out = model(ids[:, :7], use_cache=True)
        pieces = [out.logits]
        out = model(ids[:, 7:8], past_key_values=out.past_key_values)  # the same block: it goes on
        pieces.append(out.logits)
    with carry_states(model, first.states) as second:
        pieces.append(model(ids[:, 8:], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-10, rtol=1e-8)
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert list(first.states) == list(second.states) == names
    assert not torch.equal(first.states[names[0]].delta, second.states[names[0]].delta)
    assert torch.equal(model(ids).logits, whole)  # nothing stays behind on the modules


def test_masked_tokens_teach_nothing():
    model, ids = llama(torch.float64), tokens(1, 12)
    replace_linears(model, "*.down_proj")
    let_it_learn(model)
    alone = model(ids[:, 4:]).logits
    mask = torch.arange(12).unsqueeze(0) >= 4
    positions = (torch.arange(12) - 4).clamp_min(0).unsqueeze(0)
    given = {"attention_mask": mask.long(), "position_ids": positions}
    with carry_states(model, mask=mask):
        padded = model(ids, **given).logits
    torch.testing.assert_close(padded[:, 4:], alone, atol=1e-10, rtol=1e-8)
    assert (model(ids, **given).logits[:, 4:] - alone).abs().max() > 1e-6


def test_activation_checkpointing_does_not_carry_states():
    model = llama().train()
    replace_linears(model, "*.down_proj")
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpoints its activations"), carry_states(model):
        pass
    model.eval()  # where nothing is checkpointed
    with carry_states(model) as carried:
        model(tokens(1, 3))
    assert len(carried.states) == 2


def test_gradients_flow_from_one_call_into_the_next():
    model, ids = llama(torch.float64), tokens(1, 8)
    replace_linears(model, "*.down_proj")
    let_it_learn(model)
    with carry_states(model) as carried:
        model(ids[:, :4])
        early = carried.states["model.layers.0.mlp.down_proj"].delta
        loss = model(ids[:, 4:]).logits.square().sum()
    assert torch.autograd.grad(loss, early)[0].abs().max() > 1e-6


def test_weights_stay_the_same_parameters_and_checkpoints_of_the_original_load():
    model = llama()
    original = copy.deepcopy(model.state_dict())
    head = model.lm_head.weight
    assert replace_linears(model, "lm_head") == ["lm_head"]
    assert model.lm_head.weight is head is model.get_input_embeddings().weight
    missing, unexpected = model.load_state_dict(original, strict=False)
    assert not unexpected
    assert {name.rpartition(".")[2] for name in missing} <= {"value_up", "value_down", "weight", "bias"}
    assert all(name.startswith("lm_head.") for name in missing)


def test_a_plain_network_on_rows_with_a_carried_state_equals_the_sequence():
    """[B, D] inputs: one token per row and call."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    replace_linears(network, ["0", "2"])
    let_it_learn(network)
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    with carry_states(network):
        steps = torch.stack([network(x[:, t]) for t in range(9)], dim=1)
    torch.testing.assert_close(steps, network(x), atol=1e-10, rtol=1e-8)


def test_the_check_names_the_layer_where_a_number_stops_being_finite(monkeypatch):
    monkeypatch.setenv("NESTED_LEARNING_CHECK", "1")
    model, ids = llama(), tokens(2, 6)
    replace_linears(model, "*.down_proj")
    model(ids)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.value_up[0, 0] = math.inf
    with pytest.raises(
        FloatingPointError, match=r"layer 'model\.layers\.1\.mlp\.down_proj' has .* memory read"
    ):
        model(ids)


def test_compiled_networks_give_the_same_and_carry_states():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    replace_linears(network, "2", chunk_size=4)
    let_it_learn(network)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    expected, compiled = network(x), torch.compile(network, backend="eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-12, rtol=1e-10)
    with carry_states(network):
        pieces = [compiled(x[:, :5]), compiled(x[:, 5:])]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-10, rtol=1e-8)


def test_a_module_that_occurs_twice_is_replaced_by_one():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.Tanh(), shared)
    assert replace_linears(network, "0") == ["0", "2"]
    assert network[0] is network[2]
    assert isinstance(network[0], DropInLinear)


def test_same_seed_same_layers():
    models = [llama(), llama()]
    for model in models:
        torch.manual_seed(5)
        replace_linears(model, "*_proj")
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("down_prj", r"no nn.Linear of LlamaForCausalLM is named 'down_prj'; did you mean '\*.down_proj'"),
        (
            ["*.down_proj", "model.layers.7.mlp.up_proj"],
            r"'model.layers.7.*did you mean 'model.layers.[01].mlp.up_proj'",
        ),
        ("model.norm", "'model.norm' is a LlamaRMSNorm; only modules of the class nn.Linear"),
    ],
)
def test_unknown_names_are_refused_and_nothing_is_replaced(names, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        replace_linears(model, names)
    assert not any(isinstance(m, SelfModifyingLinear) for m in model.modules())


def test_states_of_other_layers_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no drop-in layers"), carry_states(model):
        pass
    replace_linears(model, "*.down_proj")
    with carry_states(model) as carried:
        model(tokens(1, 3))
    wrong = {"model.layers.0.mlp.down_prj": carried.states["model.layers.0.mlp.down_proj"]}
    with (
        pytest.raises(ValueError, match=r"Did you mean 'model\.layers\.0\.mlp\.down_proj'"),
        carry_states(model, wrong),
    ):
        pass
