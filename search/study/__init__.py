"""The loop of a search and where its record is kept: a journal file or PostgreSQL."""
