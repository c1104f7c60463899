"""Metrics, trackers and the record of sessions of a run."""
