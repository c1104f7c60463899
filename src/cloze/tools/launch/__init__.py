"""Start the processes of a run; the files that `cloze init` writes."""
