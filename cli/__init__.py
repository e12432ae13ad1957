"""The `novelgpt` command: everything that the toolkit does, under one name."""

import novelgpt  # noqa: F401  what has to be settled before anything else is imported
