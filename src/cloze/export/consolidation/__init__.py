"""From checkpoints, ours (`stored`) or others' (`foreign`), to a folder that transformers loads (`model_folder`)."""
