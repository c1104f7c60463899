"""Metrics for `evaluate.load(path)`."""
