"""Checks before and after training, and the doctor's findings."""
