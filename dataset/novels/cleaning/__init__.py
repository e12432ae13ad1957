"""Removal of advertisements and notices by rules, and the check whether a text is Chinese prose."""
