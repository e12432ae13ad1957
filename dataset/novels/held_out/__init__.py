"""Works that are held out before anything is trained: their list, and how they are recognised in any collection."""
