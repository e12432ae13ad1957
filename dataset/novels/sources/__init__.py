"""Raw files to decoded books: .txt, .txt.gz, .zip, .epub, .jsonl, and folders with one file per chapter."""
