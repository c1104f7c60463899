"""Cloze: distributed training of masked language models."""

__version__ = "0.1.0"
