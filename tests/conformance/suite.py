"""Test classes for Hope from transformers' mixins, laid out where `tests` is transformers' own folder.

One class per entry of `table.CONFIGURATIONS`, without the tests of `table.NOT_APPLICABLE`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.causal_lm_tester import CausalLMModelTest
from tests.models.hope.table import (
    CONFIGURATIONS,
    FOR_ATTENTION,
    LEARNING_FROM_GENERATED,
    NOT_APPLICABLE,
    OWN_CACHE,
)
from tests.test_modeling_common import ids_tensor
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from nested_learning import HopeCache, HopeConfig, HopeForCausalLM, HopeModel
from nested_learning.models.hope import (
    HopeForQuestionAnswering,
    HopeForSequenceClassification,
    HopeForTokenClassification,
)
from nested_learning.training.data.tokenizers import byte_tokenizer
from tests import test_configuration_common, test_pipeline_mixin

# The values that any configuration has to keep, of a version that had more of them.
_common = test_configuration_common.config_common_kwargs
_fields = {field.name for field in dataclasses.fields(PreTrainedConfig)}
test_configuration_common.config_common_kwargs = {k: v for k, v in _common.items() if k in _fields}

# transformers' tests take a model's task from these lists of its own classes.
for task, model in {
    "": HopeModel,
    "FOR_CAUSAL_LM": HopeForCausalLM,
    "FOR_SEQUENCE_CLASSIFICATION": HopeForSequenceClassification,
    "FOR_TOKEN_CLASSIFICATION": HopeForTokenClassification,
    "FOR_QUESTION_ANSWERING": HopeForQuestionAnswering,
}.items():
    names = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_"))
    names["hope"] = model.__name__


class HopeModelTester:
    """What transformers' mixins ask of a model's tester."""

    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    num_labels, type_sequence_label_size = 3, 2
    is_training = True
    config_class = HopeConfig
    base_model_class, causal_lm_class = HopeModel, HopeForCausalLM
    sequence_classification_class = HopeForSequenceClassification
    token_classification_class = HopeForTokenClassification
    question_answering_class = HopeForQuestionAnswering
    all_model_classes = (
        HopeModel,
        HopeForCausalLM,
        HopeForSequenceClassification,
        HopeForTokenClassification,
        HopeForQuestionAnswering,
    )

    def __init__(self, parent: unittest.TestCase, fields: dict[str, Any]) -> None:
        self.parent, self.fields = parent, fields

    def get_config(self, vocab_size: int = vocab_size) -> HopeConfig:
        """A small configuration."""
        return HopeConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            cms_levels=[{"chunk_size": 2}, {"chunk_size": 8}],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[HopeConfig, dict[str, torch.Tensor]]:
        """A configuration and a batch whose rows are padded on the right."""
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        lengths = torch.tensor([self.seq_length - 2, self.seq_length, self.seq_length - 1])
        mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        """As above, in the order that `create_and_check_model` takes them."""
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, inputs["input_ids"], inputs["attention_mask"]

    def create_and_check_model(self, config: HopeConfig, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """The base model runs, with a mask and without."""
        model = HopeModel(config).eval()
        for given in (mask, None):
            y = model(ids, attention_mask=given).last_hidden_state
            assert y.shape == (self.batch_size, self.seq_length, self.hidden_size)


class HopeTests(CausalLMModelTest):
    """All of transformers' tests that are there, for one configuration."""

    fields: dict[str, Any]
    has_attentions = False
    # A third of transformers' steps with a larger learning rate: the thresholds stay, and it takes a third.
    training_overfit_steps, training_overfit_learning_rate = 100, 5e-3
    pipeline_model_mapping = {  # noqa: RUF012
        "feature-extraction": HopeModel,
        "text-generation": HopeForCausalLM,
        "text-classification": HopeForSequenceClassification,
        "zero-shot": HopeForSequenceClassification,
        "token-classification": HopeForTokenClassification,
    }
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = HopeModelTester(self, self.fields)
        self.config_tester = test_configuration_common.ConfigTester(
            self, config_class=HopeConfig, hidden_size=32
        )
        self.all_model_classes = HopeModelTester.all_model_classes

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: HopeConfig
    ) -> None:
        assert isinstance(past_key_values, HopeCache)
        assert past_key_values.batch_size == batch_size
        assert past_key_values.get_seq_length() == seq_length
        assert set(past_key_values.states) == set(config.state_names)

    def _check_caches_are_equal(self, first: HopeCache, second: HopeCache) -> None:
        assert first.get_seq_length() == second.get_seq_length()
        torch.testing.assert_close(first.tokens_seen, second.tokens_seen)
        assert set(first.states) == set(second.states)
        for name, state in first.states.items():
            for a, b in zip(state.tensors(), second.states[name].tensors(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def run_task_tests(self, task: str, dtype: str = "float32") -> None:
        """As in transformers, with a small model of its own where that takes one from the hub."""
        model = self.pipeline_model_mapping.get(task)
        with tempfile.TemporaryDirectory() as folder:
            summary = {}
            if model is not None:
                tokenizer = byte_tokenizer()
                target = Path(folder, HopeConfig.model_type, model.__name__)
                model(self.model_tester.get_config(vocab_size=len(tokenizer))).save_pretrained(target)
                tokenizer.save_pretrained(target)
                summary = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
                summary = {model.__name__: summary}
            with (
                mock.patch.object(test_pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder),
                mock.patch.object(test_pipeline_mixin, "tiny_model_summary", summary),
            ):
                super().run_task_tests(task, dtype)


def _without(test: str, reason: str) -> Any:
    """A test that cannot apply."""

    def skipped(self: unittest.TestCase, *args: Any, **kwargs: Any) -> None:
        self.skipTest(f"not applicable: {reason}")

    skipped.__name__ = test
    return skipped


def _with_attentions(test: str) -> Any:
    """A test that transformers asks of models with attention only, asked of Hope without any too."""

    def run(self: HopeTests, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(self, "has_attentions", True):
            getattr(super(type(self), self), test)(*args, **kwargs)

    run.__name__ = test
    return run


def _with_a_cache_of_its_own(test: str) -> Any:
    """A test that asks for a kind of transformers' own cache, run with Hope's."""
    generate = HopeForCausalLM.generate

    def own(
        model: HopeForCausalLM, *args: Any, cache_implementation: str | None = None, **kwargs: Any
    ) -> Any:
        return generate(model, *args, **kwargs)

    def run(self: HopeTests, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(HopeForCausalLM, "generate", own):
            getattr(super(type(self), self), test)(*args, **kwargs)

    run.__name__ = test
    return run


def _learning_from_generated(test: str) -> Any:
    """A test during which `generate` is called with `learn_from_generated`."""
    generate = HopeForCausalLM.generate

    def learning(model: HopeForCausalLM, *args: Any, **kwargs: Any) -> Any:
        return generate(model, *args, learn_from_generated=True, **kwargs)

    def run(self: HopeTests, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(HopeForCausalLM, "generate", learning):
            getattr(super(type(self), self), test)(*args, **kwargs)

    run.__name__ = test
    return run


def _reason(configuration: str, test: str) -> str | None:
    """Why a test cannot apply; its name may have the number and values that `parameterized` appends."""
    reasons = NOT_APPLICABLE.get(configuration, {})
    return next((why for name, why in reasons.items() if re.fullmatch(rf"{name}(_\d+(_.*)?)?", test)), None)


for configuration, fields in CONFIGURATIONS.items():
    body: dict[str, Any] = {"fields": fields}
    for test, _ in inspect.getmembers(HopeTests, callable):
        reason = _reason(configuration, test)
        if test in FOR_ATTENTION:
            body[test] = _with_attentions(test)
        if any(test.startswith(name) for name in OWN_CACHE):
            body[test] = _with_a_cache_of_its_own(test)
        if test in LEARNING_FROM_GENERATED and fields.get("cms_update", "none") != "none":
            body[test] = _learning_from_generated(test)
        if reason:
            body[test] = _without(test, reason)
    name = f"Hope_{configuration}"
    globals()[name] = type(name, (HopeTests, unittest.TestCase), body)
