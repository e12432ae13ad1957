"""Full-parameter supervised fine-tuning."""

import novelgpt as novelgpt
