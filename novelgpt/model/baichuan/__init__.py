"""The four Baichuan base models as native classes, known to transformers' Auto classes once this is imported.

Checkpoint folders as they were published load without their remote code, and saved ones need none.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.modeling import BaichuanForCausalLM, BaichuanModel, NormHead
from novelgpt.text.baichuan_tokenizer import BaiChuanTokenizer, BaichuanTokenizer

__all__ = ["BaichuanConfig", "BaichuanForCausalLM", "BaichuanModel", "BaichuanTokenizer", "NormHead"]

AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
# Both names are known, the first is what a folder without a tokenizer_config.json gets.
AutoTokenizer.register(
    BaichuanConfig, tokenizer_class=BaichuanTokenizer, slow_tokenizer_class=BaiChuanTokenizer, exist_ok=True
)
