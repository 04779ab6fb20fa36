"""What a run found, for people: an HTML page, a JSON record, a table for the terminal, and the repaired weights."""
