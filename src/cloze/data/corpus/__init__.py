"""Read documents from local files and from datasets of the Hugging Face Hub."""
