"""The models. Importing this package registers `statex` with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import StatexCache
from .configuration import StatexConfig
from .loading import load
from .modeling import StatexForCausalLM, StatexModel

AutoConfig.register("statex", StatexConfig)
AutoModel.register(StatexConfig, StatexModel)
AutoModelForCausalLM.register(StatexConfig, StatexForCausalLM)

__all__ = ["StatexCache", "StatexConfig", "StatexForCausalLM", "StatexModel", "load"]
