"""Full-parameter supervised fine-tuning."""
