"""Generation from a checkpoint or an adapter, and its scores."""
