"""Turn checkpoints into models, describe them, and publish them."""
