"""No comparison with a tolerance lets a NaN pass."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch

import cloze
from cloze.export.consolidation.foreign import _difference
from cloze.utils.closeness import largest, relative_difference, within

NAN = float("nan")
PACKAGE = Path(cloze.__file__).parent
_TOLERANT = re.compile(r"TOLERANCE|^(difference|excess|rtol|atol)$")


def test_a_nan_is_within_nothing_and_is_the_largest():
    assert within(1.0, 1.0)
    assert not within(NAN, 1.0)
    assert not within(0.0, NAN)
    assert math.isnan(largest([0.0, NAN, 2.0]))
    assert largest([]) == 0.0


@pytest.mark.parametrize("values", [(NAN, 1.0), (1.0, NAN), (math.inf, 1.0), (1.0, -math.inf), (NAN, NAN)])
def test_values_that_are_not_finite_are_infinitely_far(values: tuple[float, float]):
    here, there = (torch.tensor([[1.0, value]]) for value in values)
    assert relative_difference(here, there) == math.inf


def test_differences_are_relative_to_the_largest_value():
    assert relative_difference(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25
    assert relative_difference(torch.tensor([1.0]), torch.tensor([0.0])) == math.inf
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_difference(torch.zeros(2), torch.zeros(3)) == math.inf


@pytest.mark.parametrize("copy", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("written", "stored"), [(NAN, 1.0), (1.0, NAN), (math.inf, math.inf)])
def test_foreign_weights_that_are_not_finite_are_refused(written: float, stored: float, copy: torch.dtype):
    found = _difference(torch.tensor([1.0, written]), torch.tensor([1.0, stored], dtype=copy))
    assert not within(found, 1.0)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_tolerances_are_compared_in_one_place(path: Path):
    if path.name == "closeness.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Gt | ast.GtE | ast.Lt | ast.LtE) for op in node.ops
        ):
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            assert not any(_TOLERANT.search(name) for name in names), f"line {node.lineno}: use closeness.within"
