"""A derived file names the weights it is made of, and nothing older or of other weights is taken for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from corpus import TINY_MODEL
from huggingface_hub import ModelCard
from ranks import cloze_ranks, succeed
from safetensors.torch import load_file, save_file

from cloze.checkpoint.format import read_manifest
from cloze.checkpoint.lineage import from_mapping, of_checkpoint, read_record, same_weights
from cloze.checkpoint.model_path import resolve_model_path
from cloze.cli import main
from cloze.config import ConsolidateConfig, EvaluateConfig
from cloze.evaluation.evaluate import evaluate
from cloze.export.consolidation.consolidate import consolidate


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoint-2, checkpoint-4 and a moving average, not to be changed."""
    folder = tmp_path_factory.mktemp("lineage")
    flags = [*TINY_MODEL, "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2"]
    flags += ["--ema_decay", "0.5", "--per_device_train_batch_size", "2"]
    flags += ["--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    succeed(cloze_ranks(["train", *flags], 2, "ddp", folder / "log"))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def half_way(run: Path, prepared: Path) -> None:
    """Consolidate and evaluate the run when it was at step 2, then continue it to step 4."""
    aside = run.parent / "checkpoint-4"
    (run / "checkpoint-4").rename(aside)
    consolidate(ConsolidateConfig(checkpoint=str(run)))
    evaluate(EvaluateConfig(model=str(run), data=str(prepared), use_cpu=True))
    aside.rename(run / "checkpoint-4")


def steps_of(path: Path) -> tuple[int, ...]:
    found = from_mapping(json.loads(path.read_text()))
    assert found is not None
    return found.steps


def card_of(run: Path) -> ModelCard:
    return ModelCard((run / "model" / "README.md").read_text())


def fails(*words: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return int(leaving.value.code or 0)


def test_an_evaluation_of_half_a_run_is_not_the_models_at_its_end(
    run: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
):
    half_way(run, prepared)
    assert steps_of(run / "eval.json") == steps_of(run / "model" / "cloze.json") == (2,)
    stale = json.loads((run / "eval.json").read_text())["perplexity"]

    assert fails("push", run, "--repo", "user/demo", "--dry_run") == 2
    said = capsys.readouterr().err
    assert "is of step 2, and checkpoint-4 is newer; run `cloze consolidate" in said

    consolidate(ConsolidateConfig(checkpoint=str(run)))
    assert "eval.json is of step 2, and the model of step 4; its numbers are left out" in capsys.readouterr().err
    assert card_of(run).data.eval_results is None
    assert f"{stale}" not in card_of(run).content

    evaluate(EvaluateConfig(model=str(run), data=str(prepared), use_cpu=True))
    assert fails("push", run, "--repo", "user/demo", "--dry_run") == 0
    shown = capsys.readouterr()
    assert "weights: step 4" in shown.out
    assert "left out" not in shown.err


def test_a_run_stands_for_its_newest_weights(run: Path, prepared: Path, capsys: pytest.CaptureFixture[str]):
    half_way(run, prepared)
    capsys.readouterr()
    values = evaluate(EvaluateConfig(model=str(run), data=str(prepared), use_cpu=True))
    shown = capsys.readouterr()
    assert values["lineage"]["steps"] == [4]
    assert f"{run / 'model'}: is of step 2, and checkpoint-4 is newer" in shown.err
    assert f"{run / 'checkpoint-4'}: step 4" in shown.out
    assert evaluate(EvaluateConfig(model=str(run / "model"), data=str(prepared), use_cpu=True))["lineage"][
        "steps"
    ] == [2]


def test_a_model_has_the_checksum_of_its_checkpoint_whatever_it_is_stored_as(run: Path, tmp_path: Path):
    there = of_checkpoint(read_manifest(run / "checkpoint-4"))
    consolidate(ConsolidateConfig(checkpoint=str(run)))
    assert same_weights(there, read_record(run / "model"))
    consolidate(ConsolidateConfig(checkpoint=str(run), output=str(tmp_path / "half"), dtype="bf16"))
    half = read_record(tmp_path / "half")
    assert half is not None
    assert (half.weights, half.dtype) == (there.weights, "bf16")
    assert not same_weights(there, half)
    assert of_checkpoint(read_manifest(run / "checkpoint-2")).weights != there.weights


@pytest.mark.parametrize(
    ("flags", "told", "again"),
    [
        ({"weights": "ema"}, "the moving average of step 4", "--weights ema"),
        ({"average": 2}, "the mean of the weights of steps 2 and 4", "--average 2"),
    ],
)
def test_averages_say_what_they_are(run: Path, flags: dict, told: str, again: str):
    consolidate(ConsolidateConfig(checkpoint=str(run), **flags))
    assert f"| made of | {told} |" in card_of(run).text
    assert f"cloze consolidate runs/model {again} && cloze push" in card_of(run).text.replace("cloze-roberta", "model")
    assert resolve_model_path(str(run)).folder == str(run / "model")


def test_weights_that_were_replaced_by_hand_are_not_the_runs(run: Path, capsys: pytest.CaptureFixture[str]):
    consolidate(ConsolidateConfig(checkpoint=str(run)))
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1.0)
    save_file(tensors, file, {"format": "pt"})
    assert resolve_model_path(str(run)).folder == str(run / "checkpoint-4")
    assert "model.safetensors is not the file that consolidation wrote" in capsys.readouterr().err
    assert fails("push", run, "--repo", "user/demo", "--dry_run") == 2
    assert "so its weights are unknown" in capsys.readouterr().err
    assert resolve_model_path(str(run / "model")).lineage is None


def test_a_checkpoint_of_another_run_is_not_taken_for_this_ones(run: Path, capsys: pytest.CaptureFixture[str]):
    consolidate(ConsolidateConfig(checkpoint=str(run)))
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(identity | {"seed": identity["seed"] + 1}))
    assert fails("consolidate", run) == 2
    assert "checkpoint-4: belongs to another run than the folder it is in" in capsys.readouterr().err
    assert fails("push", run, "--repo", "user/demo", "--dry_run") == 2
    assert "of another run than the one in" in capsys.readouterr().err


def test_a_model_without_a_record_is_used_only_if_it_is_named(
    run: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
):
    half_way(run, prepared)
    (run / "model" / "cloze.json").unlink()
    values = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({key: one for key, one in values.items() if key != "lineage"}))
    capsys.readouterr()
    assert fails("push", run, "--repo", "user/demo", "--dry_run") == 2
    assert f"or give {run / 'model'} to take it as it is" in capsys.readouterr().err
    assert fails("push", run / "model", "--repo", "user/demo", "--dry_run") == 0
    shown = capsys.readouterr()
    assert "does not record the checkpoint it is made of" in shown.err
    assert "Perplexity (fixed masks)" in shown.out
