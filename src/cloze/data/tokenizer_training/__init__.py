"""Train tokenizers on a corpus, and extend pretrained ones."""
