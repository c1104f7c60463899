"""The process that pushes a run's checkpoints: `python -m cloze.export.hub.pusher`, started by
cloze.export.hub.follow.

Reads a PushJob as a line of JSON from standard input, later the line `end`; exits at once if standard input closes, as
when training was killed. Writes {"note": what it does} and at last {"end": {"url" or "problem"}} as lines to standard
output, warnings to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cloze.checkpoint.format import list_checkpoints
from cloze.errors import ClozeError
from cloze.export.cards.metadata import CardInfo, base_and_dataset
from cloze.export.hub.client import HubBusy, Target, connect
from cloze.export.hub.follow import POLL_SECONDS, PushJob, identity
from cloze.utils.atomic_files import remove_tree
from cloze.utils.terminal.console import warn

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0  # between retries during training
TRIES_AT_END = 3
LAST_PAUSE = 5.0  # before the first retry after training, doubled for the next
WORK = "push.tmp"


def main() -> None:
    """Push until training ends and its last checkpoint is on the Hub, or cannot be pushed."""
    order = PushJob(**json.loads(sys.stdin.readline()))
    with contextlib.suppress(OSError):
        os.nice(10)
    ended = threading.Event()
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    work = Path(order.run_dir) / WORK
    remove_tree(work, quietly=True)  # left by a killed process
    end = Pusher(order, work).follow(ended)
    remove_tree(work, quietly=True)
    tell({"end": end})


def _listen(ended: threading.Event) -> None:
    """Wait for the line `end`; if standard input closes first, training was killed: exit."""
    if sys.stdin.readline().strip() != "end":
        os._exit(1)
    ended.set()
    if not sys.stdin.readline():
        os._exit(1)


def tell(line: dict[str, Any]) -> None:
    """Write a line to the training process."""
    with contextlib.suppress(OSError):
        print(json.dumps(line), flush=True)


class Pusher:
    """Pushes the checkpoints of one run. `waiting`: seconds until the next try after one that failed."""

    def __init__(self, order: PushJob, work: Path):
        self._order, self._work = order, work
        self._run = Path(order.run_dir)
        self._target = Target(order.repo, private=order.private, revision=order.revision)
        self._told = CardInfo(order.license, order.language)
        self._api = connect(order.token, quiet=True)
        self._done = {(name, number) for name, number in order.known}
        self._pushed: tuple[str, int] | None = None
        self._url = ""

    def follow(self, ended: threading.Event) -> dict[str, str]:
        """Push new checkpoints until training ends; return {"url": ...} of the last push, or {"problem": one line}."""
        pause, again, failed = FIRST_PAUSE, 0.0, None
        while not ended.wait(POLL_SECONDS):
            new = self._new()
            if not new or self._order.strategy == "end":
                continue
            if failed == identity(new[-1]) and time.monotonic() < again:
                continue
            try:
                self._push(new, f"Training in progress, {_step(new[-1])}")
                pause, failed = FIRST_PAUSE, None
            except (ClozeError, OSError) as error:
                pause = pause if failed is None else min(2 * pause, LONGEST_PAUSE)
                again, failed = time.monotonic() + pause, identity(new[-1])
                warn(f"{new[-1].name} was not pushed: {error}; it is tried again with the next, or in {pause:.0f} s")
        return self._finish()

    def _finish(self) -> dict[str, str]:
        newest = list_checkpoints(self._run)[-1:]
        if not newest:
            return {"problem": "there is no checkpoint"}
        if self._pushed == identity(newest[0]):
            return {"url": self._url}
        for number in range(TRIES_AT_END):
            try:
                self._push(self._new() or newest, f"End of training, {_step(newest[0])}")
                return {"url": self._url}
            except (ClozeError, OSError) as error:
                problem = str(error)
                if not isinstance(error, HubBusy) or number + 1 == TRIES_AT_END:
                    break
                warn(f"{newest[0].name} was not pushed: {problem}; trying again")
                time.sleep(LAST_PAUSE * 2**number)
        return {"problem": problem}

    def _new(self) -> list[Path]:
        """Return the checkpoints saved since the last push, oldest first."""
        return [folder for folder in list_checkpoints(self._run) if identity(folder) not in self._done]

    def _push(self, checkpoints: list[Path], message: str) -> None:
        """Push one commit: the newest checkpoint's model and card, and what else the strategy asks for."""
        from cloze.export.cards.model_card import write_card
        from cloze.export.consolidation.model_folder import consolidate
        from cloze.export.hub.publish import push_model, with_license

        # Training may delete a checkpoint at any time: links to its files keep them.
        remove_tree(self._work)
        wanted = checkpoints if self._order.strategy == "all_checkpoints" else checkpoints[-1:]
        identities = {folder: identity(folder) for folder in checkpoints}
        held = {folder: self._work / folder.name for folder in wanted if _link(folder, self._work / folder.name)}
        if not held:
            return
        newest = list(held)[-1]
        tell({"note": f"consolidating {newest.name}"})
        model = self._work / "model"
        with contextlib.redirect_stdout(sys.stderr):
            consolidate(held[newest], model, 5 * 10**9)
        self._told = with_license(self._api, self._told, *base_and_dataset(self._run))
        (model / "README.md").unlink()
        kept = self._run / "model" / "README.md"
        if kept.is_file():
            shutil.copy(kept, model)  # a card that the user wrote is kept
        write_card(model, self._run, self._order.repo, self._told)
        size = sum(file.stat().st_size for file in model.iterdir())
        tell({"note": f"uploading {newest.name} ({size / 1e6:,.0f} MB and what goes with it)"})
        folders = {
            "checkpoint": {"last-checkpoint": held[newest]},
            "all_checkpoints": {folder.name: copy for folder, copy in held.items()},
        }.get(self._order.strategy, {})
        self._url = push_model(self._api, self._target, model, message, folders).url
        self._pushed = identities[newest]
        self._done |= set(identities.values())
        remove_tree(self._work, quietly=True)
        tell({"note": f"{newest.name} is on the Hub"})


def _step(folder: Path) -> str:
    return f"step {folder.name.split('-')[-1]}"


def _link(folder: Path, copy: Path) -> bool:
    """Make `copy` of links to the files of `folder`, or of copies if links fail; return whether it is complete."""
    try:
        shutil.copytree(folder, copy, copy_function=_link_file)
        return True
    except (FileNotFoundError, shutil.Error):  # training has deleted it
        remove_tree(copy, quietly=True)
        return False


def _link_file(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    main()
