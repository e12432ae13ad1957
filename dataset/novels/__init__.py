"""Novels as people have them on disk -> clean chapters, without repeats, split by book."""
