"""Loading a base through AutoModel, and the small embedded base.

Importing it makes Baichuan and Qwen v1 known to transformers' Auto classes.
"""

from novelgpt.model import baichuan as baichuan
from novelgpt.model import qwen1 as qwen1
