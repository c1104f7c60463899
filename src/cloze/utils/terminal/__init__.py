"""Print to a person, or as JSON to a program."""
