"""`cloze inspect` and `cloze replay`: show what a prepared folder or a step of a run contains."""
