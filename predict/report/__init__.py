"""A page about one or several runs: scores, pictures, examples."""
