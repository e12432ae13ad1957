"""Scores of generated Chinese text against its reference."""
