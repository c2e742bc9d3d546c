"""Adapters of peft: they act and learn in every layer and mode, merge, save and load."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ecosystem.tiny_hope import hope, ids, slow_but

peft = pytest.importorskip("peft")
TEXT = ids()
ROOT = Path(__file__).parents[2]


def adapted(model, seed=2, **options):
    """The model with LoRA, whose change is not zero."""
    options = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", **options}
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(0.2 * torch.randn_like(p))
    return lora.double()


def logits(model, **options):
    with torch.no_grad():
        return model(TEXT, **options).logits


def differ(a, b):
    return (a - b).abs().max()


@pytest.mark.parametrize("case", slow_but())
def test_an_adapter_acts_and_learns_on_every_linear_layer(case):
    """Output and gradients are those of a model whose weights are W + s·BA, written out."""
    written = hope(case)
    lora = adapted(copy.deepcopy(written))
    layers = {name: m for name, m in lora.base_model.model.named_modules() if hasattr(m, "lora_A")}
    linears = {n for n, m in written.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    assert set(layers) == linears
    with torch.no_grad():
        for name, layer in layers.items():
            assert differ(logits(written), logits(lora)) > 1e-6
            written.get_parameter(f"{name}.weight").add_(layer.get_delta_weight("default"))
    loss, other = (model(TEXT, labels=TEXT).loss for model in (lora, written))
    assert differ(loss, other) < 1e-9
    loss.backward()
    other.backward()
    for name, layer in layers.items():
        A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        g = written.get_parameter(f"{name}.weight").grad
        assert g.abs().max() > 0
        assert differ(A.grad, s * B.T @ g) < 1e-9 * (1 + g.abs().max()), name
        assert differ(B.grad, s * g @ A.T) < 1e-9 * (1 + g.abs().max()), name
        assert min(A.grad.abs().max(), B.grad.abs().max()) > 0, name


SOME = ["self_modifying_titans", "mac", "gated_deltanet", "regression nested", "lm"]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("case", SOME)
def test_variants_of_lora_merge_to_what_they_are(case, options):
    base = hope(case)
    lora = adapted(copy.deepcopy(base), **options)
    out = logits(lora)
    assert differ(out, logits(base)) > 1e-6
    assert differ(out, logits(copy.deepcopy(lora).merge_and_unload())) < 1e-9
    with lora.disable_adapter():
        assert differ(logits(lora), logits(base)) < 1e-9


@pytest.mark.parametrize("case", SOME)
def test_ia3_scales_inputs_and_outputs(case):
    base = hope(case)
    names = {"target_modules": r".*(gates\..*|up|down|in_proj)", "feedforward_modules": r".*down"}
    config = peft.IA3Config(task_type="CAUSAL_LM", **names)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ia3_" in name:
                p.add_(0.2 * torch.randn_like(p))
    model.double()
    assert differ(logits(model), logits(base)) > 1e-6
    model(TEXT, labels=TEXT).loss.backward()
    for name, p in model.named_parameters():
        if "ia3_" in name:
            assert p.grad.abs().max() > 0, name
    assert differ(logits(model), logits(copy.deepcopy(model).merge_and_unload())) < 1e-9


@pytest.mark.parametrize("case", SOME)
def test_what_was_saved_is_loaded(case, tmp_path):
    lora = adapted(hope(case))
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(hope(case), tmp_path).eval()
    assert differ(logits(again), logits(lora)) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", ["deltanet", "lm"])
def test_on_embedding_and_head(case, tied, tmp_path):
    base = hope(case, tie_word_embeddings=tied)
    targets = ["embed_tokens", "in_proj"] if tied else ["embed_tokens", "lm_head", "in_proj"]
    lora = adapted(copy.deepcopy(base), target_modules=targets)
    lora(TEXT, labels=TEXT).loss.backward()
    for name, p in lora.named_parameters():
        if "lora_" in name:
            assert p.grad.abs().max() > 0, name
    with pytest.raises(ValueError, match="token ids must lie in 0"):
        lora(torch.full((1, 3), 31))
    before = logits(lora)
    lora.save_pretrained(tmp_path, save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert differ(logits(again.eval()), before) < 1e-12
    if not tied:  # a tied head would take the embedding's change over on merging
        assert differ(logits(lora.merge_and_unload()), before) < 1e-9


@pytest.mark.parametrize("case", [*SOME, "mag", "hybrid"])
def test_tokens_with_a_cache_are_the_whole(case):
    lora = adapted(hope(case))
    whole, cache, pieces = logits(lora), None, []
    with torch.no_grad():
        for piece in TEXT.split([5, 1, 1, 6], dim=1):
            out = lora(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert differ(torch.cat(pieces, 1), whole) < 1e-9
    made = lora.generate(TEXT, max_new_tokens=4, do_sample=False)
    assert torch.equal(made[:, 13:14], whole[:, -1:].argmax(-1))


PACKAGE_BEFORE_PEFT = """
import sys
from tests.ecosystem.tiny_hope import hope
model = hope("deltanet")
assert "peft" not in sys.modules
import peft
peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
"""


def test_default_target_modules_where_peft_is_imported_last():
    subprocess.run([sys.executable, "-c", PACKAGE_BEFORE_PEFT], check=True, cwd=ROOT)


def test_default_target_modules():
    """Every matrix of the blocks but the small gates of memories."""
    lora = peft.get_peft_model(hope("mac"), peft.LoraConfig(task_type="CAUSAL_LM"))
    found = {name.rpartition(".")[2] for name, m in lora.named_modules() if hasattr(m, "lora_A")}
    wanted = "in_proj gate_proj out_proj qkv_proj recall_proj recall_out attention_out up down"
    assert found == set(wanted.split())


def test_initial_memories_are_trained_as_a_whole(tmp_path):
    """LoRA takes matrices and stacks of them; initial memories have one axis more, and are small."""
    with pytest.raises(ValueError, match="only 2d and 3d"):
        peft.get_peft_model(hope("titans"), peft.LoraConfig(target_parameters=["initial.W1"]))
    lora = adapted(hope("titans"), modules_to_save=["initial"])
    trained = {n: p for n, p in lora.named_parameters() if ".initial." in n and p.requires_grad}
    assert len(trained) == 2
    lora(TEXT, labels=TEXT).loss.backward()
    for p in trained.values():
        assert p.grad.abs().max() > 0
        with torch.no_grad():
            p.add_(0.1)
    lora.save_pretrained(tmp_path)
    out = logits(lora)
    again = peft.PeftModel.from_pretrained(hope("titans"), tmp_path).eval()
    assert differ(logits(again), out) < 1e-12
    assert differ(logits(lora.merge_and_unload()), out) < 1e-9


@pytest.mark.parametrize("case", ["regression", "lm"])
def test_a_bias_that_a_fast_weight_cannot_have_is_refused(case):
    with pytest.raises(ValueError, match="lora_bias"):
        logits(adapted(hope(case), lora_bias=True))


@pytest.mark.parametrize("case", ["titans", "regression"])
def test_dropout_is_drawn_again_where_layers_are_computed_again(case):
    """The gradient is the slope of the loss at what was drawn."""
    lora = adapted(hope(case, recompute="chunk"), lora_dropout=0.5).train()

    def loss():
        torch.manual_seed(3)
        return lora(TEXT, labels=TEXT).loss

    loss().backward()
    drawn = torch.rand(1)
    learned = [p for p in lora.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in learned]
    slope = sum((p.grad * d).sum() for p, d in zip(learned, directions, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(learned, directions, strict=True):
                p.add_(d, alpha=step)
        ends.append(loss().detach())  # with gradients: without them layers draw for all tokens at once
    assert differ(slope, (ends[0] - ends[1]) / 2e-5) < 1e-4
    assert torch.equal(torch.rand(1), drawn)  # the backward pass drew nothing new


@pytest.mark.parametrize("case", ["regression", "lm"])
def test_dropout_keeps_the_mean(case):
    """Dropout that falls on the columns of a fast weight's change averages out, as dropout on inputs does."""
    lora = adapted(hope(case), lora_dropout=0.1)
    block = lora.base_model.model.model.layers[0].cms.blocks[0]
    x = torch.zeros(1, 1, 16, dtype=torch.float64)
    wanted = block.matrices(x)["up.weight"]
    block.train()
    torch.manual_seed(0)
    mean = torch.stack([block.matrices(x)["up.weight"] for _ in range(2000)]).mean(0)
    assert differ(mean, wanted) < 0.1 * wanted.abs().max()


def two_adapters(case, **options):
    options = {"r": 2, "target_modules": None, **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(hope(case), config, adapter_name="first")
    model.add_adapter("second", config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn_like(p))
    return model.double().eval()


@pytest.mark.parametrize("case", ["titans", "self_modifying_titans"])
def test_rows_have_adapters_of_their_own(case):
    model, alone = two_adapters(case), []
    together = logits(model, adapter_names=["first", "second"])
    for row, name in enumerate(("first", "second")):
        model.set_adapter(name)
        alone.append(logits(model)[row])
    assert differ(together, torch.stack(alone)) < 1e-9


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("mac", {}),
        ("mag", {}),
        ("mal", {}),
        ("self_modifying_titans", {"target_modules": "all-linear"}),
        ("regression", {}),
        ("lm", {}),
    ],
)
def test_adapters_of_their_own_are_refused_where_a_layer_is_read_for_all_rows(case, options):
    model = two_adapters(case, **options)
    with pytest.raises(ValueError, match="adapter_names gives each row an adapter of its own"):
        logits(model, adapter_names=["first", "second"])
