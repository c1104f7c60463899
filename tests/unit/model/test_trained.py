"""--freeze: a regular expression that names some parameters, or one line."""

from __future__ import annotations

import signal

import pytest
import torch

from cloze.errors import ConfigError
from cloze.model import trained
from cloze.model.trained import compile_pattern, freeze_matching


def model() -> torch.nn.Module:
    layers = {"embeddings": torch.nn.Linear(2, 2), "a" * 40: torch.nn.Linear(2, 2)}
    return torch.nn.ModuleDict(layers)


def test_parameters_whose_names_begin_like_the_pattern_are_frozen():
    some = model()
    assert freeze_matching(some, "embed") == 2
    assert [name for name, p in some.named_parameters() if p.requires_grad] == [
        f"{'a' * 40}.{k}" for k in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("nothing", "matches no parameter"), (".*", "matches every parameter"), ("(", "not a regular expression")],
)
def test_a_pattern_that_cannot_be_meant_is_one_line(pattern: str, expected: str):
    with pytest.raises(ConfigError, match=f"^--freeze: .*{expected}"):
        freeze_matching(model(), pattern)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(?P<a", "[z-a]"])
def test_what_is_no_expression_is_known_before_there_is_a_model(pattern: str):
    with pytest.raises(ConfigError, match=r"^--freeze: not a regular expression"):
        compile_pattern(pattern)


def test_a_pattern_that_takes_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trained, "MATCH_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ConfigError, match="names of parameters"):
        freeze_matching(model(), "(a+)+$")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
