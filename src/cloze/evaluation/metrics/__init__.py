"""Modules for `evaluate.load(path)`."""
