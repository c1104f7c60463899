"""What goes from rank to rank is JSON, which cannot run code, and arrives as what it was."""

from __future__ import annotations

import ast
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

import cloze
from cloze.distributed.collectives import ERRORS, decode, encode, raise_on_any_rank
from cloze.errors import CheckpointError, ClozeError, LaunchError, LostRank, Stopped


class OwnError(CheckpointError):
    """A class that other ranks need not know."""


@pytest.mark.parametrize(
    "value",
    [
        None,
        -(2**63),
        0.1,
        -math.inf,
        "é\udcff\n",
        ["a", ["b"], {}],
        ("a", (1, None)),
        {"x": {"~": 1, "y": (2,)}},
        {("layer.weight", "exp_avg"): 3, 4: [Path("runs/x")]},
        [Path("/a b"), True, False],
    ],
    ids=repr,
)
def test_a_value_arrives_as_what_it_was(value: Any):
    found = decode(encode(value))
    assert found == value
    assert repr(found) == repr(value), "types too"


def test_an_error_arrives_as_its_class_with_its_fields():
    for name, kind in ERRORS.items():
        if name != "LostRank":
            found = decode(encode(kind("what", where=Path("a/b"), hint="do this")))
            assert type(found) is kind
            assert (found.what, found.where, found.hint) == ("what", "a/b", "do this")
    lost = decode(encode(LostRank("gone", exit_code=2, loud=True, lost={"rank": 3, "step": 7})))
    assert (type(lost), lost.exit_code, lost.loud, lost.lost) == (LostRank, 2, True, {"rank": 3, "step": 7})
    stopped = decode(encode(Stopped("SIGTERM: stopped", 130)))
    assert (type(stopped), str(stopped), stopped.exit_code) == (Stopped, "SIGTERM: stopped", 130)
    assert type(decode(encode(OwnError("x")))) is CheckpointError
    assert ERRORS["ClozeError"] is ClozeError


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(print),
        b"",
        b"[" * 100_000,
        b"\xff",
        b'{"~":["error",["SystemExit",{"what":"x"}]]}',
        b'{"~":["error",["ClozeError",{"no":"x"}]]}',
        b'{"~":["path"]}',
        b'{"~":["eval","1"]}',
    ],
    ids=lambda data: data[:40],
)
def test_anything_else_is_refused_in_one_line(data: bytes):
    with pytest.raises(LaunchError, match="cannot be read"):
        decode(data)


def test_what_cannot_be_sent_is_a_mistake_in_the_program():
    with pytest.raises(TypeError, match="a set cannot be sent"):
        encode({"a": {1}})


def test_a_problem_of_one_rank_is_raised():
    raise_on_any_rank(None)
    with pytest.raises(CheckpointError, match="damaged"):
        raise_on_any_rank(CheckpointError("damaged"))


def test_no_pickles_are_exchanged():
    """torch's collectives for objects unpickle what the other side sent."""
    for path in Path(cloze.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name == "parse_object":  # of jsonargparse
                continue
            assert not name.endswith(("_object", "_object_list", "_objects", "recv_object_list")), f"{path}: {name}"
