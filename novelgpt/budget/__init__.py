"""Memory, disk and micro-batch of a run, estimated before it starts."""
