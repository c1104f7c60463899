"""Load tokenizers, check them, and encode texts with the fastest backend that gives the same ids."""
