"""Estimate the memory of one rank for each engine."""
