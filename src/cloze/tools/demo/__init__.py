"""The demonstration run and its sample corpus."""
