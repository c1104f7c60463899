"""Turn checkpoints of Cloze (`stored`) or other tools (`foreign`) into a folder for transformers (`model_folder`)."""
