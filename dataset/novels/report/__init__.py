"""report.html of a prepared collection."""
