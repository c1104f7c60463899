"""The Hugging Face Hub: its client, what goes up (`publish`, `blocks`), pushing beside a run (`follow`, `pusher`)."""
