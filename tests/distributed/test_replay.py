"""`cloze replay`: the batch it shows is, to the bit, the one that was trained on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from corpus import TINY_MODEL, make_prepared
from ranks import cloze_ranks, succeed
from recording import digest, record, recorded_steps
from safetensors.numpy import load_file

from cloze.config.parser import parse
from cloze.data.batches.masking import IGNORE_INDEX
from cloze.errors import ConfigError, DataError
from cloze.tools.inspect.replay import rebuild, replay

FLAGS = [*TINY_MODEL, "--num_train_epochs", "1.3", "--save_strategy", "epoch", "--learning_rate", "1e-3"]
FLAGS += ["--per_device_train_batch_size", "13", "--mlm_probability", "0.2", "--random_replace_prob", "0.3"]
FLAGS += ["--mask_replace_prob", "0.5", "--seed", "7"]


@pytest.fixture(scope="module")
def recorded(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[int, str]]]:
    """A run of two ranks whose last step is part full, and what it was trained on."""
    folder = tmp_path_factory.mktemp("replay")
    argv = ["train", *FLAGS, "--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    succeed(cloze_ranks(argv, 2, "zero2", folder / "log", record(folder / "seen")))
    return folder / "run", recorded_steps(folder / "seen")


def test_every_step_is_rebuilt_to_the_bit(recorded: tuple[Path, dict[int, dict[int, str]]]):
    run, steps = recorded
    last = max(steps)
    for step, trained in steps.items():
        batch = rebuild(run, step + 1)
        found = {
            int(sample): digest(ids, labels)
            for sample, ids, labels in zip(batch.samples, batch.input_ids, batch.labels, strict=True)
        }
        if step == last:  # places past the end of the run were computed, but had no labels
            assert 0 < len(found) < len(trained)
            assert found.items() <= trained.items()
        else:
            assert found == trained
    with pytest.raises(ConfigError, match=f"the run has steps 1 to {last + 1}"):
        rebuild(run, last + 2)


def test_it_is_shown_decoded_and_stored(recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, _ = recorded
    output = tmp_path / "batch.safetensors"
    _, config = parse(["replay", str(run), "--step", "3", "--samples", "2", "--output", str(output)])
    replay(config)
    shown, batch = capsys.readouterr().out, rebuild(run, 3)
    assert f"samples 52-77, epoch {52 / len_of(run):.3f}, {(batch.labels != IGNORE_INDEX).sum()} masked" in shown
    assert f"sample 52, block {batch.blocks[0]}:" in shown
    assert "and 24 more (--samples)" in shown
    masked = (batch.labels[:2] != IGNORE_INDEX).sum()
    assert len(re.findall("⟦[^⟦⟧]*⟧", shown)) == masked
    assert 0 < len(re.findall("⟦[^⟦⟧]* → <mask>⟧", shown)) < masked
    stored = load_file(output)
    for name in ("samples", "blocks", "input_ids", "labels"):
        assert (stored[name] == getattr(batch, name)).all(), name


def len_of(run: Path) -> int:
    return json.loads((run / "data.json").read_text())["splits"]["train"]["blocks"]


def test_data_that_moved_or_changed(recorded, prepared: Path, tmp_path: Path):
    run, _ = recorded
    shutil.copytree(prepared, tmp_path / "moved")
    assert rebuild(run, 2, str(tmp_path / "moved")).checksum == rebuild(run, 2).checksum
    other = make_prepared(tmp_path / "other", num_threads=200)
    with pytest.raises(DataError, match=r"not the data of this run: .*--data"):
        rebuild(run, 2, str(other))
    with pytest.raises(ConfigError, match="not a run's folder"):
        rebuild(prepared, 2)
