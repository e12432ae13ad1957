"""What the pipelines share: settings, text, models, training and scoring. It imports none of them.

Importing it makes Baichuan and Qwen v1 known to transformers' Auto classes.
"""

from novelgpt.model import baichuan as baichuan
from novelgpt.model import qwen1 as qwen1
