"""Hope for transformers; importing this registers "hope" with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.modeling_hope import HopeForCausalLM, HopeModel
from nested_learning.models.hope.pretrained_hope import HopePreTrainedModel

AutoConfig.register("hope", HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)

__all__ = ["HopeCache", "HopeConfig", "HopeForCausalLM", "HopeModel", "HopePreTrainedModel"]
