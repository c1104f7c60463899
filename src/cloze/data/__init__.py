"""From a corpus to fixed blocks, and from a position in the run to a batch. Knows nothing of training."""
