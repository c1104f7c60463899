"""`cloze push`: publish a model with its card on the Hub."""

from __future__ import annotations

from pathlib import Path

from cloze.card import write_card
from cloze.config import PushConfig
from cloze.console import say
from cloze.hub import files_to_push, find_model, push_folder


def run(config: PushConfig) -> None:
    """Bring the card up to date and push, or with --dry_run say what would be pushed."""
    model_dir, run_dir = find_model(Path(config.path))
    files_to_push(model_dir)
    card = write_card(model_dir, run_dir)
    if config.dry_run:
        for file in files_to_push(model_dir):
            say("push", f"{file.stat().st_size:>14,} bytes  {file.name}")
        print(card.read_text(encoding="utf-8").split("---")[1].strip())
        say("push", f"dry run: nothing was sent to {config.repo}")
        return
    url = push_folder(model_dir, config.repo, config.private, config.revision, config.commit_message, config.token)
    say("push", url)
