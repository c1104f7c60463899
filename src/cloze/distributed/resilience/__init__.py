"""Notice failed and hanging ranks, record errors, handle signals, and keep one owner per run folder."""
