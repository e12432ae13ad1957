"""Full checkpoints in formats that other tools load."""
