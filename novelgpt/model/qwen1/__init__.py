"""Qwen v1 for transformers' Auto classes, without the remote code of its checkpoints. Importing registers it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from novelgpt.model.qwen1.configuration import QWenConfig
from novelgpt.model.qwen1.modeling import ORIGINAL_NAMES, QWenLMHeadModel, QWenModel
from novelgpt.model.qwen1.tokenization import QWenTokenizer

AutoConfig.register(QWenConfig.model_type, QWenConfig)
AutoModel.register(QWenConfig, QWenModel)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel)
AutoTokenizer.register(QWenConfig, tokenizer_class=QWenTokenizer)
register_checkpoint_conversion_mapping(QWenConfig.model_type, ORIGINAL_NAMES)
