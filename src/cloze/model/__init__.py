"""The model, its attention, and its head at masked positions."""
