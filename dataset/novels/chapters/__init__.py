"""The lines of a book to chapters: headings, tables of contents, front matter, paragraphs."""
