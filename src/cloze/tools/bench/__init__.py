"""Measurements beside peers, each in one run on one machine. They print tables and assert nothing."""
