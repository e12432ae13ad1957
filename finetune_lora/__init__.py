"""LoRA supervised fine-tuning."""
