"""Push a run's checkpoints to the Hub during training: `cloze train --push_to_hub`.

Rank 0 starts a process that watches the run's folder for new checkpoints, consolidates the newest and pushes it. It
cannot stop or delay training, or change its random numbers. It needs no synchronization, because only a complete
checkpoint has its name. It always pushes the newest one, which makes up for failed or late pushes.

    with following(config):     # the token and its rights are checked here
        train(config)           # then waits for the last push
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloze.checkpoint.format import MANIFEST, list_checkpoints
from cloze.config import TrainConfig
from cloze.errors import ConfigError, Stopped
from cloze.export.hub.client import Target, check_access, connect
from cloze.utils.environment import processes
from cloze.utils.foreign.paths import real_path
from cloze.utils.terminal.console import is_main, progress, say, warn

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PushJob:
    """The input of the pushing process, on its standard input; `token` is passed in no other way. `known`: checkpoints
    that existed before this start, as `identity` names them."""

    run_dir: str
    repo: str
    strategy: str
    token: str | None = None
    private: bool | None = None
    revision: str | None = None
    license: str | None = None
    language: str | None = None
    known: tuple[tuple[str, int], ...] = ()


def identity(folder: Path) -> tuple[str, int]:
    """Return what distinguishes a checkpoint from one saved again under its name."""
    try:
        return folder.name, (folder / MANIFEST).stat().st_ino
    except OSError:
        return folder.name, 0


@contextlib.contextmanager
def following(config: TrainConfig) -> Iterator[None]:
    """Push checkpoints of the run in the background while the block runs; at its end, wait for the last push.

    On rank 0 only. Raises ConfigError or HubError before the block if pushing is impossible, and Stopped if Ctrl-C
    ends the waiting. A push that fails is reported, not raised. If the block raises, it does not wait.
    """
    if not (config.push_to_hub and is_main()):
        yield
        return
    order = _order(config)
    follower = Follower(order)
    try:
        yield
        follower.finish()
    finally:
        follower.close()


def _order(config: TrainConfig) -> PushJob:
    """Return the job, after checking that pushing is possible."""
    if config.save_strategy == "no":
        raise ConfigError(
            "--push_to_hub requires saving checkpoints", where="--push_to_hub", hint="set another --save_strategy"
        )
    token = config.hub_token or config.token
    name = config.hub_model_id or real_path(config.output_dir).name
    target = Target(name, private=config.hub_private_repo, revision=config.hub_revision)
    repo = check_access(connect(token), target)
    say("push", f"to {repo}, {config.hub_strategy}")
    return PushJob(
        run_dir=config.output_dir,
        repo=repo,
        strategy=config.hub_strategy,
        token=token,
        private=config.hub_private_repo,
        revision=config.hub_revision,
        license=config.license,
        language=config.language,
        known=tuple(identity(folder) for folder in list_checkpoints(Path(config.output_dir))),
    )


class Follower:
    """The pushing process, as rank 0 controls it."""

    def __init__(self, order: PushJob):
        self._order = order
        self._note, self._shown = "", 0
        self._end: dict[str, Any] = {}
        environment = {name: value for name, value in os.environ.items() if name not in processes.RANK_VARIABLES}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        # A session of its own: only training handles Ctrl-C. The process exits when its standard input closes.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cloze.export.hub.pusher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._say(json.dumps(asdict(order)))
        self._listener = threading.Thread(target=self._listen, name="push", daemon=True)
        self._listener.start()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                self._note = message.get("note", self._note)
                self._end = message.get("end", self._end)

    def finish(self) -> None:
        """Wait for the last push, and report its address, or how to push by hand. Raises Stopped on Ctrl-C."""
        self._say("end")
        begin = time.monotonic()
        try:
            with progress("push", total=None, unit="s") as advance:
                while self._process.poll() is None:
                    time.sleep(POLL_SECONDS / 5)
                    passed = int(time.monotonic() - begin)
                    advance(passed - self._shown, note=self._note)
                    self._shown = passed
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes twice, once through the launcher
            raise Stopped(f"interrupted while pushing; training is done, {self._by_hand()}", 130) from None
        self._listener.join(timeout=10)
        if "url" in self._end:
            say("push", self._end["url"])
        else:
            warn(f"not pushed: {self._end.get('problem', 'the process that pushes ended')}; {self._by_hand()}")

    def _by_hand(self) -> str:
        run, branch = self._order.run_dir, self._order.revision
        more = (" --private" if self._order.private else "") + (f" --revision {branch}" if branch else "")
        return f"push by hand: cloze consolidate {run} && cloze push {run} --repo {self._order.repo}{more}"

    def close(self) -> None:
        """End the process, also during a push: commits are atomic."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
