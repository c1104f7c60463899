"""Checkpoints as files: format, checksums, readers. Nothing here trains."""
