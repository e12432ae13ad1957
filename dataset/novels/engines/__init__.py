"""Runs one function over many files: local processes, or datatrove's executors for Slurm and Ray."""
