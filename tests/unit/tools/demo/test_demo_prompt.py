"""The demo's prompt reads well with every answer."""

from __future__ import annotations

from cloze.tools.demo.run_demo import PROBE


def test_no_article_stands_before_the_mask():
    assert PROBE.split("<mask>")[0].split()[-1] not in ("a", "an")
