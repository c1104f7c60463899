"""Files, terminal output, environment variables and foreign input. Knows nothing of models."""
