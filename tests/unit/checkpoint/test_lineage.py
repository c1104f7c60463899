"""What a lineage is a checksum of, and what it does not depend on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from numpy import arange, float32
from safetensors.numpy import save_file

from cloze.checkpoint.format import verify_checkpoint, write_manifest
from cloze.checkpoint.lineage import (
    Lineage,
    changed_file,
    from_mapping,
    of_average,
    of_checkpoint,
    read_record,
    run_id,
    same_run,
    same_weights,
    scores_of,
    write_record,
)
from cloze.checkpoint.model_path import newer_checkpoint, resolve_model_path
from cloze.errors import CheckpointError, ModelError


def manifest(pieces: list[tuple[str, int]], frozen: str = "f", step: int = 4, **run: Any) -> dict[str, Any]:
    """A checkpoint.json with (parameter, sum) of each piece."""
    return {
        "parameters": {"a": {"shape": [4]}, "b": {"shape": [2, 2]}},
        "pieces": [
            {"name": name, "key": key, "sum": total} for name, total in pieces for key in ("weight", "exp_avg")
        ],
        "files": {"frozen.safetensors": {"sha256": frozen}},
        "position": {"global_step": step},
        "run": run,
    }


def test_the_checksum_does_not_depend_on_how_ranks_cut_the_weights():
    whole = of_checkpoint(manifest([("a", 5), ("b", -7)]))
    cut = of_checkpoint(manifest([("b", -(2**63)), ("a", 2), ("b", 2**63 - 7), ("a", 3)]))
    assert same_weights(whole, cut)


@pytest.mark.parametrize(
    "other",
    [manifest([("a", 6), ("b", -7)]), manifest([("a", -7), ("b", 5)]), manifest([("a", 5), ("b", -7)], frozen="g")],
)
def test_other_weights_have_another_checksum(other: dict[str, Any]):
    assert not same_weights(of_checkpoint(manifest([("a", 5), ("b", -7)])), of_checkpoint(other))


def test_a_lineage_survives_json_and_what_is_none_is_unknown():
    members = [of_checkpoint(manifest([("a", step)], step=step)) for step in (2, 4)]
    average = of_average(members)
    assert of_average(members[:1]) is members[0]
    assert from_mapping({"lineage": json.loads(json.dumps(average.as_mapping()))}) == average
    assert str(average) == "the mean of the weights of steps 2 and 4"
    good = average.as_mapping()
    for bad in ({"steps": [-1]}, {"steps": "4"}, {"kind": []}, {"weights": 3}, {"steps": [True]}, {"dtype": None}):
        assert from_mapping({"lineage": good | bad}) is None
    assert from_mapping({"lineage": [good]}) is None


def test_weights_of_other_origin_are_named_as_such():
    assert str(Lineage("foreign", None, (), "w")) == "another program's checkpoint"
    assert str(Lineage("grown", None, (), "w", "bf16")) == "a model that `cloze grow` made in bf16"
    assert str(Lineage("ema", None, (4,), "w")) == "the moving average of step 4"


def test_runs_are_told_apart_by_data_and_seed_but_not_by_how_old_their_record_is():
    old, new = {"data": "d", "seed": 1}, {"data": "d", "blocks": "b", "seed": 1}
    assert same_run(run_id(old), run_id(new))
    assert same_run(run_id(new), run_id(new | {"data": "renamed", "model_name_or_path": "/moved"}))
    assert not same_run(run_id(new), run_id(new | {"blocks": "c"}))
    assert not same_run(run_id(old), run_id(old | {"seed": 2}))
    assert same_run(run_id({}), run_id(old))


def test_scores_are_used_only_with_the_weights_they_are_of():
    here, other = (of_checkpoint(manifest([("a", total)], step=total)) for total in (1, 2))
    scores = {"perplexity": 3.0, "lineage": here.as_mapping()}
    assert scores_of(here, scores) == (scores, None)
    assert scores_of(None, {"perplexity": 3.0}) == ({"perplexity": 3.0}, None)
    for model, values in ((other, scores), (None, scores), (here, {"perplexity": 3.0})):
        kept, line = scores_of(model, values)
        assert kept == {}
        assert line is not None
        assert "left out" in line


def test_a_file_that_was_replaced_added_or_removed_is_named(tmp_path: Path):
    save_file({"a": arange(4, dtype=float32)}, tmp_path / "model.safetensors")
    write_record(tmp_path, Lineage("trained", None, (4,), "w"))
    assert read_record(tmp_path) == Lineage("trained", None, (4,), "w")
    assert changed_file(tmp_path) is None
    save_file({"a": arange(4, dtype=float32)[::-1].copy()}, tmp_path / "model.safetensors")
    assert changed_file(tmp_path) == "model.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert changed_file(tmp_path) == "model-00001-of-00001.safetensors"
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    assert changed_file(tmp_path) == "model.safetensors"
    (tmp_path / "cloze.json").write_text('{"files": []}')
    assert changed_file(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"lineage": {"kind": "other"}}'])
def test_a_record_that_cannot_be_read_is_an_error_and_none_is_none(tmp_path: Path, content: str):
    assert read_record(tmp_path) is None
    (tmp_path / "cloze.json").write_text(content)
    with pytest.raises(ModelError, match=r"cloze\.json: damaged: .*`cloze consolidate"):
        read_record(tmp_path)


def write_checkpoint(folder: Path, **run: Any) -> None:
    """Write a complete checkpoint without weights."""
    folder.mkdir(parents=True)
    step = int(folder.name.rpartition("-")[2])
    values = manifest([], **run) | {"files": {}, "parameters": {}, "tied": {}, "config": {}, "precision": "no"}
    position = {"global_step": step, "samples_seen": 0, "tokens_seen": 0}
    optimizer = {"class": "AdamW", "groups": []}
    write_manifest(folder, values | {"format_version": 2, "position": position, "optimizer": optimizer})


@pytest.mark.parametrize("records", [True, False])
def test_a_model_without_a_record_is_not_pushed_as_that_of_a_run_whose_models_have_one(
    tmp_path: Path, records: bool, capsys: pytest.CaptureFixture[str]
):
    """Models of older versions have no record, and neither have their runs' checkpoints the checksum of the blocks."""
    model, checkpoint = tmp_path / "run" / "model", tmp_path / "run" / "checkpoint-4"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    write_checkpoint(checkpoint, **({"data": "d", "blocks": "b"} if records else {"data": "d"}))
    if records:
        with pytest.raises(
            ModelError, match=r"does not record the checkpoint.*`cloze consolidate .*, or give .*model"
        ):
            resolve_model_path(str(tmp_path / "run"), consolidated=True)
        assert capsys.readouterr().err == "", "the error says it, so no warning does"
    else:
        assert resolve_model_path(str(tmp_path / "run"), consolidated=True).folder == str(model)
    assert resolve_model_path(str(model), consolidated=True).folder == str(model)
    assert resolve_model_path(str(checkpoint)).folder == str(checkpoint)
    with pytest.raises(ModelError):
        resolve_model_path(str(checkpoint), consolidated=True)


def test_only_a_name_that_is_no_path_may_be_one_on_the_hub(tmp_path: Path):
    assert resolve_model_path("user/demo").folder == "user/demo"
    with pytest.raises(ModelError, match="not a model folder"):
        resolve_model_path(str(tmp_path))
    for name in ("./nowhere", "/nowhere", "runs/nowhere"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model_path(name)


def test_a_changed_model_of_a_run_without_checkpoints_is_used_with_a_warning(tmp_path: Path, capsys):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    save_file({"a": arange(4, dtype=float32)}, model / "model.safetensors")
    record = Lineage("trained", None, (4,), "w")
    write_record(model, record)
    assert resolve_model_path(str(model)).lineage == record  # of no run
    (tmp_path / "run" / "config.yaml").write_text("{}")
    assert resolve_model_path(str(tmp_path / "run")).lineage == record
    assert not capsys.readouterr().err
    save_file({"a": arange(5, dtype=float32)}, model / "model.safetensors")
    for name in (tmp_path / "run", model):
        found = resolve_model_path(str(name))
        assert (found.folder, found.lineage) == (str(model), None)
        assert "so its weights are unknown; it is used as it is" in capsys.readouterr().err


def rotating(run: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save checkpoint-6 and delete checkpoint-4, as training does, "before" or "after" checkpoint-4 is verified."""

    def verify(folder: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        found = verify_checkpoint(folder, *arguments, **options) if when == "after" else {}
        if folder.name == "checkpoint-4":
            write_checkpoint(run / "checkpoint-6")
            shutil.rmtree(folder)
        return found or verify_checkpoint(folder, *arguments, **options)

    for module in ("cloze.checkpoint.format", "cloze.checkpoint.model_path"):
        monkeypatch.setattr(f"{module}.verify_checkpoint", verify)


@pytest.mark.parametrize("name", ["run", "run/checkpoint-4"])
def test_a_checkpoint_that_training_deletes_once_it_is_chosen_is_a_one_line_error(
    tmp_path: Path, name: str, monkeypatch
):
    write_checkpoint(tmp_path / "run" / "checkpoint-4")
    rotating(tmp_path / "run", "after", monkeypatch)
    with pytest.raises(CheckpointError, match="checkpoint-4: was deleted"):
        resolve_model_path(str(tmp_path / name))


def test_a_named_checkpoint_that_training_deletes_while_it_is_verified_is_a_one_line_error(
    tmp_path: Path, monkeypatch
):
    write_checkpoint(tmp_path / "run" / "checkpoint-4")
    rotating(tmp_path / "run", "before", monkeypatch)
    with pytest.raises(CheckpointError, match="checkpoint-4: was deleted"):
        resolve_model_path(str(tmp_path / "run" / "checkpoint-4"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_newer_checkpoint_is_found_even_if_one_is_deleted_while_it_is_read(
    tmp_path: Path, when: str, monkeypatch, capsys
):
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoint-4")
    rotating(run, when, monkeypatch)
    newest = newer_checkpoint(run, Lineage("trained", None, (2,), "w"))
    assert newest == run / "checkpoint-6"
    assert capsys.readouterr().err == ""
