"""Turn a corpus into a prepared folder, or into blocks during training."""
