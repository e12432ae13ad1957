"""Generation from a checkpoint or an adapter, and its scores."""

import novelgpt as novelgpt
