"""Arguments, how they are read, and the checks before a run."""
