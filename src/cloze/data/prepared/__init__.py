"""Read and write prepared folders: blocks of tokens in shards, and their manifest."""
