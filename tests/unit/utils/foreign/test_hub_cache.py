"""Without the Hub, what is missing says so, and which cache was searched."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from cloze.config import PrepareConfig
from cloze.data.corpus.hub import open_hub
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import ClozeError
from cloze.evaluation.fill_mask import fill
from cloze.utils.foreign.hub_cache import unreachable
from cloze.utils.foreign.pretrained import load_error

USES = {
    "model": lambda: fill("no-such/thing", "a <mask>", 1),
    "tokenizer": lambda: load_tokenizer("no-such/thing"),
    "dataset": lambda: open_hub(PrepareConfig(dataset_name="no-such/thing", tokenizer_name="x", output="y"), "train"),
}


@pytest.mark.parametrize("use", USES)
def test_offline_is_named_with_the_cache(use: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ClozeError) as caught:
        USES[use]()
    line = str(caught.value)
    assert line.startswith("no-such/thing: cannot load the ")
    assert "the Hub is not asked: HF_HUB_OFFLINE is set" in line
    assert "cache" in line
    assert str(Path(constants.HF_HUB_CACHE).parent) in line
    assert "save_pretrained" not in line


def test_a_lost_connection_is_named_with_the_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    cause = type("ConnectError", (Exception,), {})("[Errno -2] Name or service not known")
    error = OSError("We couldn't connect to 'https://huggingface.co'")
    error.__cause__ = cause
    line = str(load_error(error, "no-such/thing", "tokenizer"))
    assert "no such folder, not in the cache" in line
    assert "the Hub cannot be reached: no connection" in line
    assert str(constants.HF_HUB_CACHE) in line
    assert unreachable(OSError("no-such/thing is not a valid model identifier")) is None


def test_an_error_of_a_folder_is_not_one_of_the_hub(tmp_path: Path):
    assert "the Hub" not in str(load_error(ConnectionError("reset"), tmp_path, "model")).split(";")[0]
