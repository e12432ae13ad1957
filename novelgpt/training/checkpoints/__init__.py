"""Atomic, verified checkpoints, and runs that resume from them exactly."""
