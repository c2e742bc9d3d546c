"""Hope for transformers; importing this registers "hope" with the Auto classes."""

from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.classification_hope import (
    HopeForQuestionAnswering,
    HopeForSequenceClassification,
    HopeForTokenClassification,
)
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.layer_hope import HopeLayer, HopeLayerState
from nested_learning.models.hope.modeling_hope import HopeForCausalLM, HopeModel
from nested_learning.models.hope.pretrained_hope import HopePreTrainedModel
from nested_learning.models.hope.register_hope import register

register()

__all__ = [
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeForQuestionAnswering",
    "HopeForSequenceClassification",
    "HopeForTokenClassification",
    "HopeLayer",
    "HopeLayerState",
    "HopeModel",
    "HopePreTrainedModel",
]
