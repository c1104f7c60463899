"""What libraries print, log and warn of does not appear between Cloze's lines; their errors do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# A command during which libraries talk as DeepSpeed, transformers and accelerate do, one of them from its import on.
SCRIPT = """
import sys, types
from cloze.utils.terminal.console import say, show

def run(config):
    import logging, warnings
    from transformers.utils import logging as theirs
    print("Time to load cpu_adam op")
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.warning("Setting accelerator to CPU")
    theirs.get_logger("transformers.x").warning("You are using a model of another type")
    warnings.warn("torch.something is deprecated")
    list(theirs.tqdm(range(2), desc="Writing model shards"))
    say("archs", "own line", result=True)
    show("own table")
    logging.getLogger("accelerate").error("a real error")

command = sys.modules["cloze.cli.commands.archs"] = types.ModuleType("archs")  # the real one imports transformers
command.run = run
sys.argv = ["cloze", "archs"]
from cloze.cli import run
run()
"""


@pytest.mark.parametrize("form", ["auto", "quiet", "plain"])
def test_only_lines_of_cloze_and_errors_are_printed(form: str):
    environment = os.environ | {"CLOZE_LOG_FORMAT": form}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "archs        own line\nown table\n"
    assert done.stderr == "a real error\n"


@pytest.mark.parametrize("given", ["variable", "option"])
def test_verbose_shows_what_they_print_log_and_warn_of(given: str):
    environment = os.environ | {"CLOZE_LOG_FORMAT": "verbose" if given == "variable" else "plain"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    script = SCRIPT if given == "variable" else SCRIPT.replace('"archs"]', '"archs", "--log_format", "verbose"]')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == ["Time to load cpu_adam op", "Setting accelerator to CPU", "archs        own line", "own table"]
    for part in ("of another type", "torch.something is deprecated", "Writing model shards", "a real error"):
        assert part in done.stderr


def test_what_they_print_is_an_event_of_its_own_for_a_machine():
    environment = os.environ | {"CLOZE_LOG_FORMAT": "json"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["output", "archs", "output"]
    assert [event.get("text") for event in events] == ["Time to load cpu_adam op", None, "own table"]
