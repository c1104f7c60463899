"""Choose the samples of a step, mask them, and build batches."""
