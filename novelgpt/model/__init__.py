"""Loading a base through AutoModel, and the small bases.

Importing it makes Baichuan and Qwen v1 known to transformers' Auto classes, and leaves DeepSpeed to those who need it.
"""

from novelgpt.model import baichuan as baichuan
from novelgpt.model import qwen1 as qwen1
from novelgpt.settings.deepspeed_settings import limit_deepspeed_to_its_runs

limit_deepspeed_to_its_runs()
