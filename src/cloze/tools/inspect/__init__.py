"""Show what a prepared folder or a step of a run contains."""
