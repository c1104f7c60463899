"""Print to a terminal, or as JSON to a program."""
