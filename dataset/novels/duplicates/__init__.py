"""Fingerprints of chapters, duplicates among them, and the train/held-out split."""
