"""Registration of Hope with transformers and its companions, in one place."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from nested_learning.models.hope.classification_hope import (
    HopeForQuestionAnswering,
    HopeForSequenceClassification,
    HopeForTokenClassification,
)
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.modeling_hope import HopeForCausalLM, HopeModel


def register() -> None:
    """Register "hope" with the Auto classes; calling it again changes nothing."""
    AutoConfig.register("hope", HopeConfig, exist_ok=True)
    AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
    AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(HopeConfig, HopeForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(HopeConfig, HopeForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(HopeConfig, HopeForQuestionAnswering, exist_ok=True)
