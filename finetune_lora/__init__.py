"""LoRA supervised fine-tuning."""

import novelgpt as novelgpt
