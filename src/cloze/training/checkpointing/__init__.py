"""Save checkpoints of a live run, and restore them."""
