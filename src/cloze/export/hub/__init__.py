"""Push to the Hugging Face Hub: its client, what is pushed (`publish`, `blocks`), and when (`follow`, `pusher`)."""
