"""Publish a model with its card, and the blocks it was trained on, on the Hub, as `cloze push` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from cloze.config import PushConfig
from cloze.export.cards.dataset_card import dataset_card
from cloze.export.cards.metadata import CardInfo, base_and_dataset, info_of_run, metadata_text, origin_of
from cloze.export.cards.model_card import MARKER, card_text, write_card
from cloze.export.cards.weights import excluded_scores
from cloze.export.hub.client import Pushed, Target, check_access, connect, put_tag
from cloze.export.hub.publish import files_to_push, model_to_publish, push_model, with_license
from cloze.utils.atomic_files import check_writable
from cloze.utils.foreign.paths import MAX_TEXT_BYTES, read_bytes
from cloze.utils.terminal.console import say, show, warn

if TYPE_CHECKING:
    from cloze.data.prepared.shards import Prepared


def push(config: PushConfig) -> None:
    """Update the card and push; with `dry_run` print what would be pushed, without changing anything.

    Raises ConfigError, ModelError, CheckpointError, DataError or HubError.
    """
    found = model_to_publish(Path(config.path))
    model_dir, run_dir = Path(found.folder), found.run_dir
    if line := excluded_scores(model_dir, run_dir):
        warn(line)
    files_to_push(model_dir)
    blocks = None
    if config.dataset_repo:
        from cloze.export.hub.blocks import find_blocks  # imports torch, which a push without blocks does not need

        blocks = find_blocks(run_dir)
    info = info_of_run(run_dir, CardInfo(config.license, config.language, config.dataset_repo))
    metadata = metadata_text(card_text(model_dir, run_dir, config.repo, info))
    if config.dry_run:
        _show(config, model_dir, run_dir, info, blocks, metadata)
        return
    card = model_dir / "README.md"
    by_hand = card.is_file() and MARKER.encode() not in read_bytes(card, MAX_TEXT_BYTES)
    if not by_hand:
        check_writable(card, "push a copy of the model in another folder")
    api = connect(config.token)
    private = True if config.private else None
    target = Target(config.repo, private=private, revision=config.revision, create_pr=config.create_pr)
    target = replace(target, repo=check_access(api, target))
    if config.dataset_repo and blocks is not None:
        info = _push_blocks(api, config, blocks, info)
    info = with_license(api, info, *base_and_dataset(run_dir))
    write_card(model_dir, run_dir, target.repo, info)
    if info.values() and by_hand:
        warn("README.md was written by hand: license and language are not put into it")
    pushed = push_model(api, target, model_dir, config.commit_message)
    _tell(pushed)
    if config.tag:
        put_tag(api, target, config.tag, pushed.oid)
        say("push", f"tag {config.tag}")


def _push_blocks(api: HfApi, config: PushConfig, blocks: Prepared, info: CardInfo) -> CardInfo:
    """Push the blocks first, so that the model's card can name them; return the card's values."""
    from cloze.export.hub.blocks import push_blocks

    private = True if config.private else None
    target = Target(str(config.dataset_repo), "dataset", private, create_pr=config.create_pr)
    target = replace(target, repo=check_access(api, target))
    card = dataset_card(target.repo, blocks.manifest, with_license(api, info, None, origin_of(blocks.manifest)))
    _tell(push_blocks(api, target, blocks, card, "Upload blocks prepared with Cloze"))
    return replace(info, dataset=target.repo)


def _show(
    config: PushConfig, model_dir: Path, run_dir: Path | None, info: CardInfo, blocks: Prepared | None, metadata: str
) -> None:
    """Print what would be pushed, with sizes in bytes."""
    card = card_text(model_dir, run_dir, config.repo, info).encode("utf-8", "surrogateescape")
    files: dict[str, Path | bytes] = {**files_to_push(model_dir), "README.md": card}
    _list(files)
    if blocks is not None:
        from cloze.export.hub.blocks import block_files

        say("push", f"and as a dataset to {config.dataset_repo}:")
        _list(block_files(blocks, dataset_card(str(config.dataset_repo), blocks.manifest, info)))
    show(metadata or "(the card has no metadata)")
    say("push", f"dry run: nothing was sent to {config.repo}", result=True)


def _list(files: dict[str, Path | bytes]) -> None:
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        say("push", f"{size:>14,} bytes  {name}")


def _tell(pushed: Pushed) -> None:
    say("push", pushed.url if pushed.changed else f"nothing has changed since {pushed.url}", result=pushed.url)
