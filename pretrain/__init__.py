"""Continued pretraining."""

import novelgpt as novelgpt
