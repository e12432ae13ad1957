"""Checkpoints that are whole or not there, and going on from them as if nothing had happened."""
