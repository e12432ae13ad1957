"""What `python -m novelgpt.doctor` looks at. Modules that need torch are imported by the checks, not at the start."""
