"""Commands that start what the rooms below offer."""
