"""`cms_update="lm"` against a loop over chunks for one row: what each level learns, from what, and when.

The loop runs a static model of the same weights with `cms_weights`; sums, boundaries and writes are its own.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nested_learning import HopeCache, HopeForCausalLM
from nested_learning.cli.anatomy import state_bytes
from nested_learning.layers import CMSLevel
from nested_learning.memory import engine
from tests.models.small_models import VOCAB, small_model
from tests.oracles.cms import Rule, write

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
FOUR = [{"chunk_size": 2}, {"chunk_size": 4}, {"chunk_size": 8}, {"chunk_size": 16}]
MIXERS = ["attention", "titans"]


def pair(levels, variant="sequential", mixers=MIXERS, **overrides):
    """A model that learns and a static one with its weights, gradients included."""
    model = small_model(
        mixers,
        cms_levels=[{"lr": 0.5, "expansion": 0.5, **level} for level in levels],
        cms_update="lm",
        cms_variant=variant,
        **overrides,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    sizes = [{"chunk_size": level["chunk_size"], "expansion": 0.5} for level in levels]
    static = small_model(mixers, cms_levels=sizes, cms_variant=variant)
    parameters = dict(model.named_parameters())
    for name, _ in list(static.named_parameters()):  # the same tensors, so that gradients meet
        owner, leaf = static.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(owner, torch.nn.ParameterList):
            owner[int(leaf)] = parameters[name]
        else:
            setattr(owner, leaf, parameters[name])
    static.lm_head.weight = static.model.embed_tokens.weight
    return model, static


def tokens(length, seed=1):
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def run(static: HopeForCausalLM, levels, ids, learn=None, variant="sequential", exact=False):
    """Logits [T, V] of one row ids [T] and, per layer and level, weights, initial weights and boundaries."""
    levels = [CMSLevel(**{"lr": 0.5, "expansion": 0.5, **level}) for level in levels]
    learn = [True] * len(ids) if learn is None else learn
    units = {}
    for layer, block in enumerate(static.model.layers):
        for number, mlp in enumerate(block.cms.blocks):
            own = {n: p for n, p in mlp.named_parameters() if p.dim() == 2}
            units[layer, number] = SimpleNamespace(
                own=own, W=own, init=own, sum=None, initial_sum=None, writes=[],
                rules=fresh(levels[number], own),
                initial_rules=fresh(levels[min(number + 1, len(levels) - 1)], own),
            )  # fmt: skip

    def weights(of):
        return {
            layer: [of[layer, n] for n in range(len(levels))] for layer in range(len(static.model.layers))
        }

    cache, logits, size = HopeCache(static.config), [], levels[0].chunk_size
    for start in range(0, len(ids), size):
        before, chunk = cache.clone(), ids[None, start : start + size]
        now = {key: unit.W for key, unit in units.items()}
        logits.append(static(chunk, past_key_values=cache, cms_weights=weights(now)).logits[0])
        end = start + size
        if end >= len(ids):
            break
        inside, crossing = chunk_gradients(
            static, before, now, weights, chunk, ids[end], learn[start + 1 : end + 1], exact
        )
        for (layer, number), unit in units.items():
            level, key = levels[number], (layer, number)
            unit.sum = added(unit.sum, inside[key], crossing[key], end % level.chunk_size)
            nested = variant == "nested" and number + 1 < len(levels)
            if nested:
                slower = levels[number + 1]
                phase = end % slower.chunk_size
                unit.initial_sum = added(unit.initial_sum, inside[key], crossing[key], phase)
            if end % level.chunk_size == 0:
                unit.W = write(unit.W, unit.init, unit.sum, unit.rules, level, level.lr)
                unit.sum = None
                unit.writes.append(end)
            if nested and end % slower.chunk_size == 0:
                unit.init = write(
                    unit.init, unit.own, unit.initial_sum, unit.initial_rules, slower, slower.lr
                )
                unit.W, unit.initial_sum, unit.rules = unit.init, None, fresh(level, unit.own)
    return torch.cat(logits), units


def fresh(level, own):
    return {name: Rule(level.rule or "gd") for name in own}


def added(total, inside, crossing, phase):
    total = dict.fromkeys(inside, 0) if total is None else total
    return {n: total[n] + g + (crossing[n] if phase else 0) for n, g in inside.items()}


def chunk_gradients(static, cache, now, weights, chunk, following, teaches, exact):
    leaves = {
        key: {n: w * 1.0 if exact else w.detach().clone().requires_grad_() for n, w in W.items()}
        for key, W in now.items()
    }
    cache = cache if exact else cache.detach()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = static(chunk, past_key_values=cache, cms_weights=weights(leaves)).logits[0]
        losses = F.cross_entropy(logits, torch.cat([chunk[0, 1:], following[None]]), reduction="none")
        losses = losses * torch.tensor(teaches, dtype=torch.float64)
        flat = [w for W in leaves.values() for w in W.values()]
        results = []
        for loss in (losses[:-1].sum(), losses[-1]):
            found = iter(torch.autograd.grad(loss, flat, create_graph=exact, retain_graph=True))
            results.append({key: {n: next(found) for n in W} for key, W in leaves.items()})
    return results


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("length", [1, 3, 8, 17, 34])
def test_four_levels_learn_what_the_loop_learns(variant, length):
    model, static = pair(FOUR, variant, MIXERS[:1] if length > 17 else MIXERS)
    ids = tokens(length)
    with torch.no_grad():
        out = model(ids)
        for row in range(2):
            logits, units = run(static, FOUR, ids[row], variant=variant)
            torch.testing.assert_close(out.logits[row], logits, **CLOSE)
            for (layer, number), unit in units.items():
                state = out.past_key_values.states[f"layers.{layer}.cms"].level(number)
                size = FOUR[number]["chunk_size"]
                # A chunk is learned from when the next token is there, so the last one is still pending.
                assert unit.writes == [t for t in range(1, length) if t % size == 0]
                for name, W in unit.W.items():
                    torch.testing.assert_close(state.weights[name][row], W, **CLOSE)
                    if variant == "nested" and number < 3:
                        torch.testing.assert_close(state.initial[name][row], unit.init[name], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "momentum", "retention": 0.8},
        {"rule": "adam", "lr": 0.05, "activation": "gelu"},
        {"clip": 0.01},
        {"clip": 100.0, "activation": "swiglu"},
    ],
    ids=str,
)
def test_rules_and_tokens_that_teach_nothing(options):
    levels = [{"chunk_size": 3, **options}, {"chunk_size": 6, **options}]
    model, _ = pair(levels)
    static = static_twin(model, levels)
    ids = tokens(14)
    learn = torch.tensor([[t not in (1, 6, 7, 12) for t in range(14)], [t < 8 for t in range(14)]])
    with torch.no_grad():
        got = model(ids, learn_mask=learn).logits
        for row in range(2):
            expected, _ = run(static, levels, ids[row], learn[row].tolist())
            torch.testing.assert_close(got[row], expected, **CLOSE)


def static_twin(model, levels):
    sizes = [
        {"chunk_size": level["chunk_size"], "expansion": 0.5, "activation": level.get("activation")}
        for level in levels
    ]
    static = small_model(MIXERS, cms_levels=sizes)
    static.load_state_dict(model.state_dict())
    return static


@pytest.mark.parametrize("variant", ["sequential", "nested"])
@pytest.mark.parametrize("meta_gradient", ["first_order", "exact"])
def test_training_gradients_are_the_loops(meta_gradient, variant):
    levels = [{"chunk_size": 3, "retention": 0.9}, {"chunk_size": 6, "rule": "momentum"}]
    model, static = pair(levels, variant, cms_meta_gradient=meta_gradient)
    ids = tokens(15)[:1]
    probe = torch.randn(15, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad((model.train()(ids).logits[0] * probe).sum(), list(parameters.values()))
    expected, _ = run(static, levels, ids[0], variant=variant, exact=meta_gradient == "exact")
    want = torch.autograd.grad((expected * probe).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mixers", [["attention"], ["self_modifying_titans", "titans"]])
def test_exact_meta_gradients_are_finite_differences(mixers):
    levels = [{"chunk_size": 3, "clip": 0.3, "learn_lr": True}, {"chunk_size": 6}]
    model, _ = pair(levels, mixers=mixers, cms_meta_gradient="exact")
    ids = tokens(14)[:1]
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    first = pair(levels, mixers=mixers)[0]
    rough = torch.autograd.grad(first(ids, labels=ids).loss, list(first.parameters()))
    for seed in range(2):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]
        slope, losses = sum((g * d).sum() for g, d in zip(grads, direction, strict=True)), []
        for step in (1e-5, -1e-5):
            moved = {
                name: p + step * d for (name, p), d in zip(model.named_parameters(), direction, strict=True)
            }
            moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
            with torch.no_grad():
                out = torch.func.functional_call(model, moved, (ids,), {"labels": ids})
            losses.append(out.loss)
        numeric = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-7)
        approximate = sum((g * d).sum() for g, d in zip(rough, direction, strict=True))
        assert abs(approximate - numeric) > 100 * abs(slope - numeric)


def test_what_it_needs_is_said():
    model, _ = pair(FOUR[:1])
    ids = tokens(5)
    assert torch.equal(model.model(ids)[0], model.model(ids, lm_head=model.lm_head)[0])  # tied
    model.config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="run HopeForCausalLM, give lm_head, or set tie"):
        model.model(ids)
    out = model.model(ids, lm_head=model.lm_head).last_hidden_state
    assert torch.equal(model.lm_head(out), model(ids).logits)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch.no_grad\(\)"):
        model(ids)


def test_nothing_is_written_to_parameters_and_their_gradients():
    model, _ = pair(FOUR)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        cache = model(tokens(20)).past_key_values
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(t.requires_grad for state in cache.states.values() for t in state.tensors())


def test_reading_a_text_again_is_easier():
    """What was learned shows: the second time the loss is lower than that of the static model."""
    levels = [{"chunk_size": 4}, {"chunk_size": 16}]
    model, static = pair(levels)
    ids = tokens(32, seed=3).repeat(1, 3)
    with torch.no_grad():
        last = slice(64, 96)
        losses = [
            F.cross_entropy(m(ids).logits[:, last][:, :-1].mT, ids[:, last][:, 1:]) for m in (model, static)
        ]
    assert losses[0] < losses[1] - 0.3


def test_the_state_does_not_grow_and_is_counted_without_running():
    model, _ = pair(FOUR[:3], mixers=["titans"])
    sizes = set()
    with torch.no_grad():
        for length in (9, 17, 33):
            sizes.add(model(tokens(length)[:1]).past_key_values.nbytes())
    assert len(sizes) == 1
    single = state_bytes(model.config, [9, 33])
    cache = model.float()(tokens(9)[:1]).past_key_values
    # A CPU sees that no anchor moves, and lets the mixers' states at the start of the chunk share theirs.
    mixers = [state for name, state in cache.states.items() if name.endswith(".mixer")]
    shared = sum(W.nbytes for state in mixers for W in state.anchor.values())
    assert single[9] == single[33] == cache.nbytes() + shared


def test_exact_meta_gradients_of_recomputed_mixers_take_time_in_proportion(monkeypatch):
    """The same gradients, by a number of reads that is linear in the number of chunks."""
    reads = 0
    run = engine.run

    def counted(*arguments):
        nonlocal reads
        reads += 1
        return run(*arguments)

    monkeypatch.setattr(engine, "run", counted)
    mixers = {"mixers": ["titans", "titans"], "mixer_options": {"titans": {"chunk_size": 2}}}
    counts, levels = {}, [{"chunk_size": 2}]
    for length in (9, 17):
        ids, found = tokens(length)[:1], []
        for recompute in (None, "chunk"):
            model, _ = pair(levels, **mixers, cms_meta_gradient="exact", recompute=recompute)
            reads = 0
            loss = model.train()(ids, labels=ids).loss
            found.append(torch.autograd.grad(loss, list(model.parameters())))
            counts[length] = reads
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert counts[17] < 2.5 * counts[9]


def test_ids_of_32_bits_are_learned_from_as_those_of_64():
    model, _ = pair(FOUR)
    ids = tokens(9)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    cache = model(ids[:, :5].int(), use_cache=True).past_key_values
    torch.testing.assert_close(
        model(ids[:, 5:].int(), past_key_values=cache).logits, model(ids).logits[:, 5:], **CLOSE
    )
