"""A CPU without instructions for bfloat16: what is chosen for it, and what is said."""

import warnings

import pytest
import torch

from nested_learning import HopeForCausalLM, _precision
from nested_learning.cli.conversation import load_model
from nested_learning.cli.dialogue import load_pretrained
from nested_learning.training.config import TrainConfig
from nested_learning.training.data.tokenizers import byte_tokenizer
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.trainer import trainer_arguments
from tests.models.small_models import small_config

NO_INSTRUCTIONS = "this CPU has no instructions for bfloat16"


@pytest.fixture(params=[True, False])
def slow(request, monkeypatch):
    monkeypatch.setattr(_precision, "bfloat16_is_slow", lambda device: request.param)
    monkeypatch.setattr(_precision, "_warned", False)
    return request.param


@pytest.fixture
def saved(tmp_path):
    """Folder of a small model in bfloat16, with a tokenizer."""
    tokenizer = byte_tokenizer()
    model = HopeForCausalLM(small_config(["titans"], vocab_size=len(tokenizer)))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def heard(function):
    """How often the warning came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return sum(NO_INSTRUCTIONS in str(w.message) for w in caught)


def test_the_processor_is_asked(monkeypatch):
    class Processor:
        @staticmethod
        def _is_mkldnn_bf16_supported():
            return False

    monkeypatch.setattr(torch.ops, "mkldnn", Processor)
    assert _precision.bfloat16_is_slow("cpu") == torch.backends.mkldnn.is_available()
    assert not _precision.bfloat16_is_slow("cuda")
    Processor._is_mkldnn_bf16_supported = staticmethod(lambda: True)
    assert not _precision.bfloat16_is_slow("cpu")


def test_loading_a_checkpoint_warns_once(slow, saved):
    if torch.accelerator.is_available():
        pytest.skip("an accelerator is there to run it on")

    def load():
        assert HopeForCausalLM.from_pretrained(saved).dtype == torch.bfloat16

    assert heard(load) == slow
    assert heard(load) == 0
    assert heard(lambda: HopeForCausalLM.from_pretrained(saved, dtype=torch.float32)) == 0


@pytest.mark.parametrize("load", [load_model, load_pretrained])
def test_the_command_line_loads_what_is_fast(slow, saved, load):
    def check():
        assert load(str(saved))[0].dtype == (torch.float32 if slow else torch.bfloat16)

    if torch.accelerator.is_available():
        pytest.skip("an accelerator is there to run it on")
    assert heard(check) == 0


@pytest.mark.parametrize(("precision", "says"), [("bf16", True), ("fp32", False)])
def test_training_warns(slow, tmp_path, precision, says):
    config = TrainConfig(output=str(tmp_path), steps=1, precision=precision)
    assert heard(lambda: trainer_arguments(config, RunFolder(tmp_path), 1)) == (slow and says)
