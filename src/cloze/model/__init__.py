"""The model and its masked-language-modeling head."""
