"""Cards of models and datasets for the Hub: their text, metadata, curve, and the commands that make a run again."""
