"""Hope for transformers; importing this registers "hope" with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.classification_hope import (
    HopeForQuestionAnswering,
    HopeForSequenceClassification,
    HopeForTokenClassification,
)
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.modeling_hope import HopeForCausalLM, HopeModel
from nested_learning.models.hope.pretrained_hope import HopePreTrainedModel

AutoConfig.register("hope", HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HopeConfig, HopeForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HopeConfig, HopeForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(HopeConfig, HopeForQuestionAnswering, exist_ok=True)

__all__ = [
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeForQuestionAnswering",
    "HopeForSequenceClassification",
    "HopeForTokenClassification",
    "HopeModel",
    "HopePreTrainedModel",
]
