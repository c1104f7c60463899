"""`cloze push`: publish a model with its card on the Hub."""

from __future__ import annotations

from pathlib import Path

from cloze.card import card_text, metadata_text, write_card
from cloze.config import PushConfig
from cloze.console import say
from cloze.hub import check_access, connect, files_to_push, find_model, push_folder


def run(config: PushConfig) -> None:
    """Bring the card up to date and push, or with --dry_run say what would be pushed and change nothing."""
    model_dir, run_dir = find_model(Path(config.path))
    files = files_to_push(model_dir)
    card = card_text(model_dir, run_dir, config.repo)
    metadata = metadata_text(card)
    if config.dry_run:
        sizes = {file.name: file.stat().st_size for file in files}
        sizes["README.md"] = len(card.encode("utf-8", "surrogateescape"))
        for name, size in sorted(sizes.items()):
            say("push", f"{size:>14,} bytes  {name}")
        print(metadata or "(the card has no metadata)")
        say("push", f"dry run: nothing was sent to {config.repo}")
        return
    api = connect(config.token)
    repo = check_access(api, config.repo)
    write_card(model_dir, run_dir, repo)
    url = push_folder(
        api, model_dir, repo, private=config.private, revision=config.revision, message=config.commit_message
    )
    say("push", url)
