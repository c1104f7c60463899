"""`cloze compare`: the paired difference of two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from corpus import TINY_CALL as TINY
from corpus import make_prepared

import cloze
from cloze.cli.commands import consolidate
from cloze.config import CompareConfig, ConsolidateConfig, EvaluateConfig
from cloze.errors import ConfigError
from cloze.evaluation.compare import compare
from cloze.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(cloze.train(dataset_name=prepared, output_dir=tmp_path_factory.mktemp("compare") / "run", **TINY))


def moved(run: Path, folder: Path, data: Path) -> Path:
    """A copy of a run that records that it was trained on other data."""
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"dataset_name": str(data)}))
    shutil.copy(data / "manifest.json", folder / "data.json")
    return folder


def test_models_are_compared_on_the_data_that_their_runs_record(run: Path, prepared: Path, tmp_path: Path):
    other = cloze.Run(run).checkpoints[-1]
    output = tmp_path / "compared.json"
    values = compare(CompareConfig(model=str(run), other=str(other), use_cpu=True, output=str(output))).values
    given = compare(CompareConfig(model=str(run), other=str(other), use_cpu=True, data=str(prepared))).values
    assert values == given
    assert values["loss_difference"] == 0
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert json.loads(output.read_text())["data_checksum"] == manifest["checksum"]


def test_runs_of_different_data_are_not_compared_without_data(run: Path, tmp_path: Path):
    (tmp_path / "more").mkdir()
    other = moved(run, tmp_path / "other", make_prepared(tmp_path / "more", block_size=16))
    with pytest.raises(ConfigError) as caught:
        compare(CompareConfig(model=str(run), other=str(other), use_cpu=True))
    assert caught.value.where == "--data"
    assert "different data" in caught.value.what


def test_the_data_of_one_run_measure_both_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = cloze.consolidate(run, output=tmp_path / "model")
    values = compare(CompareConfig(model=str(model), other=str(run), use_cpu=True)).values
    assert values["loss_difference"] == 0
    assert str(run) in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data"))


def test_consolidate_says_what_evaluate_needs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A model in its run's folder knows its data; a copy elsewhere does not."""
    consolidate.run(ConsolidateConfig(checkpoint=str(run)))
    consolidate.run(ConsolidateConfig(checkpoint=str(run), output=str(tmp_path / "copy")))
    hints = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next")]
    assert [line.split()[1:] for line in hints] == [
        ["cloze", "evaluate", str(run)],
        ["cloze", "evaluate", str(tmp_path / "copy"), "--data", "PREPARED"],
    ]
    with pytest.raises(ConfigError, match="--data"):
        evaluate(EvaluateConfig(model=str(tmp_path / "copy"), use_cpu=True))


def test_models_without_a_run_are_not_compared_without_data(run: Path, tmp_path: Path):
    model = cloze.consolidate(run, output=tmp_path / "model")
    (model / "cloze.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError) as caught:
        compare(CompareConfig(model=str(model), other=str(model), use_cpu=True))
    assert caught.value.where == "--data"
