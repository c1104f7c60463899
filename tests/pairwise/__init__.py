"""Combinations of training options: rows that contain every pair of values, each of which is run and compared."""
