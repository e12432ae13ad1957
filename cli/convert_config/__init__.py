"""Settings of LLaMA-Factory, ms-swift and TRL -> settings of this toolkit."""
