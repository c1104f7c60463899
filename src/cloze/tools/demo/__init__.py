"""`cloze demo` and its sample corpus."""
