"""The commands as functions, for notebooks and programs: `cloze.prepare`, `cloze.train`, `cloze.evaluate` and others.

Keyword arguments are the flags of the command of the same name (`cloze train --help` explains each), and may stand in
a YAML file given as `config`. What is wrong with them is a ClozeError of one line, as on the command line.

>>> import cloze
>>> cloze.train(output_dir="runs/mine", learning_rat=1e-4)
Traceback (most recent call last):
    ...
cloze.errors.ConfigError: cloze train: unknown option learning_rat; did you mean learning_rate?

Nothing heavy is loaded before the first call.
"""

from __future__ import annotations

import functools
import inspect
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cloze.checkpoint.run_folder import Run
from cloze.config import (
    ConsolidateConfig,
    EvaluateConfig,
    FillConfig,
    PrepareConfig,
    PushConfig,
    TokenizerConfig,
    TrainConfig,
)
from cloze.errors import ConfigError, LaunchError, Stopped
from cloze.evaluation.results import Answer, Evaluation

if TYPE_CHECKING:
    from cloze.data.prepared.shards import Prepared

P = ParamSpec("P")
R = TypeVar("R")
AnyPath = str | PathLike[str]
_OWN = ("num_processes",)  # arguments of a function that its command has not


# What can be given to each function: the fields of its command, some of them by position, with paths of any kind.
# Type checkers and `help` see the functions with these signatures.
@dataclass(kw_only=True)
class _Prepare(PrepareConfig):
    dataset_name: AnyPath | None = None  # type: ignore[assignment]
    tokenizer_name: AnyPath  # type: ignore[assignment]
    output: AnyPath  # type: ignore[assignment]
    config: AnyPath | None = None


@dataclass(kw_only=True)
class _Tokenizer(TokenizerConfig):
    dataset_name: AnyPath | None = None  # type: ignore[assignment]
    output: AnyPath  # type: ignore[assignment]
    config: AnyPath | None = None


@dataclass(kw_only=True)
class _Train(TrainConfig):
    dataset_name: AnyPath | None = None  # type: ignore[assignment]
    model_name_or_path: AnyPath | None = None  # type: ignore[assignment]
    config_name: AnyPath | None = None  # type: ignore[assignment]
    tokenizer_name: AnyPath | None = None  # type: ignore[assignment]
    output_dir: AnyPath  # type: ignore[assignment]
    resume_from_checkpoint: AnyPath | None = None  # type: ignore[assignment]
    num_processes: int | None = None
    config: AnyPath | Mapping[str, Any] | None = field(default=None, kw_only=False)


@dataclass(kw_only=True)
class _Evaluate(EvaluateConfig):
    model: AnyPath = field(kw_only=False)  # type: ignore[assignment]
    data: AnyPath | None = field(default=None, kw_only=False)  # type: ignore[assignment]
    config: AnyPath | None = None


@dataclass(kw_only=True)
class _Fill(FillConfig):
    model: AnyPath = field(kw_only=False)  # type: ignore[assignment]
    text: str = field(kw_only=False)
    config: AnyPath | None = None


@dataclass(kw_only=True)
class _Consolidate(ConsolidateConfig):
    checkpoint: AnyPath = field(kw_only=False)  # type: ignore[assignment]
    config: AnyPath | None = None


@dataclass(kw_only=True)
class _Push(PushConfig):
    path: AnyPath = field(kw_only=False)  # type: ignore[assignment]
    config: AnyPath | None = None


def _command(takes: Callable[P, Any]) -> Callable[[Callable[[Any, dict[str, Any]], R]], Callable[P, R]]:
    """Return a function of (the command's configuration, arguments of its own) as one that takes the fields of
    `takes`."""
    places = [f for f in fields(takes) if not f.kw_only]  # type: ignore[arg-type]

    def wrap(function: Callable[[Any, dict[str, Any]], R]) -> Callable[P, R]:
        command = function.__name__

        @functools.wraps(function)
        def call(*args: P.args, **flags: P.kwargs) -> R:
            from cloze.config.parser import from_values
            from cloze.config.relations import ignored_options
            from cloze.tools.api.process_state import preserve_process_state, strip_traceback
            from cloze.utils.terminal.console import warn

            if len(args) > len(places):
                names = ", ".join(place.name for place in places) or "none"
                hint = f"by position: {names}"
                raise ConfigError("takes all else by name", where=f"cloze.{command}", hint=hint)
            named: dict[str, Any] = {**dict(zip([place.name for place in places], args, strict=False)), **flags}
            own = {name: named.pop(name) for name in _OWN if name in named and name in takes.__annotations__}  # type: ignore[attr-defined]
            recipe = named.pop("config", None)
            named = {**(recipe if isinstance(recipe, Mapping) else {"config": recipe} if recipe else {}), **named}

            def run() -> R:
                config = from_values(command, named)
                ignored = ignored_options(config)
                if ignored and not own:  # processes that are started from here report it
                    warn(f"ignored: {'; '.join(ignored)}")
                with preserve_process_state():
                    return function(config, own)

            return strip_traceback(run)

        signature = inspect.signature(takes).replace(return_annotation=function.__annotations__["return"])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return wrap


@_command(_Prepare)
def prepare(config: PrepareConfig, own: dict[str, Any]) -> Prepared:
    """Turn a corpus into fixed blocks of tokens in the folder `output`, and open that. What is there already is kept.

        prepared = cloze.prepare(dataset_name="corpus.jsonl", text_field="answers.text",
                                 tokenizer_name="roberta-base", output="prepared/mine")
        prepared.block_size, prepared.splits        # 128, ["train", "validation"]

    Returns a `cloze.Prepared`, which is accepted as a path. Worker processes read a script again that calls this: put
    the call under `if __name__ == "__main__":` there. Raises ClozeError.
    """
    from cloze.data.prepare.pipeline import prepare as make
    from cloze.data.prepared.shards import open_prepared

    if make(config) is None:
        hint = "start all of them, with the command `cloze prepare --shard_index i`"
        raise ConfigError("other shards are still to come", where=config.output, hint=hint)
    return open_prepared(config.output)


@_command(_Tokenizer)
def tokenizer(config: TokenizerConfig, own: dict[str, Any]) -> Path:
    """Train a tokenizer on a corpus, or extend a pretrained one, and return its folder.

        cloze.tokenizer(dataset_name="corpus.jsonl", text_field="answers.text", vocab_size=8192, output="tokenizers/x")

    Raises ClozeError.
    """
    from cloze.data.tokenizer_training.extend import make_tokenizer

    make_tokenizer(config)
    return Path(config.output)


@_command(_Train)
def train(config: TrainConfig, own: dict[str, Any]) -> Run:
    """Train, and return the run: `run.metrics` is a list of dicts, losses in nats.

        run = cloze.train(dataset_name=prepared, model_type="roberta", output_dir="runs/mine", max_steps=100)
        run.metrics[-1]["loss"]

    Without `num_processes` it trains in this process, on one device, and leaves the process as it was: random states,
    signal handlers, accelerate's state, environment; there is no process group. With `num_processes` (or `deepspeed`)
    it starts processes of their own, as `accelerate launch` does. accelerate's notebook_launcher works too, as long as
    nothing was trained on a GPU before; each process that it forks has one thread, and the run is opened afterwards:

        accelerate.notebook_launcher(cloze.train, args=(dict(dataset_name=..., output_dir="runs/x"),), num_processes=2)
        run = cloze.Run("runs/x")

    Ctrl-C (the notebook's stop button) saves a checkpoint after the step that is under way, and then raises
    KeyboardInterrupt, so that cells that follow do not run; the same call with resume_from_checkpoint="auto" resumes.
    A second Ctrl-C raises it at once. A SIGTERM or SIGUSR1, and the end of a job's time, end in `cloze.Stopped`
    likewise. Raises ClozeError.
    """
    from cloze.tools.api.process_state import is_launched

    num_processes = own.get("num_processes")
    if is_launched():
        _train_here(config, own_process=True)
    elif num_processes is not None or config.deepspeed is not None:
        from cloze.tools.api.local_workers import train_in_processes

        train_in_processes(config, 1 if num_processes is None else num_processes)
    else:
        _train_here(config, own_process=False)
    return Run(config.output_dir)


def _train_here(config: TrainConfig, own_process: bool) -> None:
    """Train in this process."""
    from cloze.tools.api.train_here import train_here
    from cloze.training.engines.choose_engine import requested_engine

    if threading.current_thread() is not threading.main_thread():
        what, hint = "training listens to signals, which only the main thread can", "give num_processes=1"
        raise LaunchError(what, where="cloze.train", hint=hint)
    if not own_process and requested_engine(config.deepspeed).needs_own_processes:
        hint = "start them with `accelerate launch -m cloze train`"
        raise LaunchError("the engine needs processes of its own", where="cloze.train", hint=hint)
    try:
        train_here(config, own_process)
    except Stopped as stop:
        if stop.exit_code != 128 + signal.SIGINT:
            raise
        raise KeyboardInterrupt(str(stop)) from None


@_command(_Evaluate)
def evaluate(config: EvaluateConfig, own: dict[str, Any]) -> Evaluation:
    """Measure a run (its consolidated model, else its newest checkpoint), a model folder or a model on the Hub.

        evaluation = cloze.evaluate(run, prepared)
        evaluation.perplexity, evaluation.interval      # on fixed masks, with 95 % confidence

    The same number for any batch size and number of processes. Raises ClozeError.
    """
    from cloze.evaluation.evaluate import evaluate as measure

    return Evaluation(measure(config))


@_command(_Fill)
def fill(config: FillConfig, own: dict[str, Any]) -> list[Answer]:
    """Return what a model puts in place of the mask: (score, token, text), the most likely first, `top_k` of them.

        cloze.fill(run, "The Milky Way is a <mask> galaxy.")[0].token       # "spiral"

    Of several masks in a text, the answers for the first come first; the others stay in `text`. Raises ClozeError.
    """
    from cloze.evaluation.fill_mask import answers

    return [answer for candidates in answers(config) for answer in candidates]


@_command(_Consolidate)
def consolidate(config: ConsolidateConfig, own: dict[str, Any]) -> Path:
    """Turn a run's newest checkpoint into a folder that `from_pretrained` and `pipeline` load, and return that.

        AutoModelForMaskedLM.from_pretrained(cloze.consolidate(run))

    Raises ClozeError.
    """
    from cloze.export.consolidation.consolidate import consolidate as write

    return write(config).folder


@_command(_Push)
def push(config: PushConfig, own: dict[str, Any]) -> None:
    """Publish a consolidated run with its model card on the Hub.

        cloze.push(run, repo="my-name/mine", dry_run=True)

    Raises ClozeError.
    """
    from cloze.export.hub.push import push as publish

    publish(config)
