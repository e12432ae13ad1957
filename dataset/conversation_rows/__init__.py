"""Papers and prepared novels to conversation rows: the command `python -m dataset conversations`."""
