"""The Trainer subclass, evaluation, and what a run writes into its folder."""
