"""Two starts are one run if what has an effect is the same, whatever the spelling."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cloze.checkpoint.identity import base_checksum, blocks_checksum, check_same_run, run_identity
from cloze.config import TrainConfig
from cloze.errors import CheckpointError, LaunchError
from cloze.training.same_on_ranks import check_equal

MANIFEST = {
    "checksum": "m",
    "block_size": 32,
    "tokenizer": {"fingerprint": "t"},
    "splits": {"train": {"shards": [{"sha256": "a"}]}},
}


def identity(base: str | None = None, manifest: dict[str, Any] = MANIFEST, **values: Any) -> dict[str, Any]:
    return run_identity(TrainConfig(output_dir="runs/x", **values), 8, manifest, base)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"max_steps": 9, "num_train_epochs": 1.0}, {"max_steps": 9, "num_train_epochs": 2.0}),
        ({"max_steps": -1}, {"max_steps": 0}),
        ({"optim": "sgd", "adam_beta1": 0.5}, {"optim": "sgd", "adam_epsilon": 1.0}),
        ({"optim_args": "eps=1e-6", "adam_epsilon": 0.5}, {"optim_args": "eps=0.000001"}),
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}),
        ({"optim_args": "amsgrad=true,eps=1"}, {"optim_args": "eps=1.0, amsgrad=True"}),
        ({"mlm_probability_end": None}, {"mlm_probability_end": 0.15}),
        ({"lr_scheduler_type": "wsd"}, {"lr_scheduler_type": "warmup_stable_decay"}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, {"lr_scheduler_type": "constant"}),
        ({"lr_scheduler_kwargs": None}, {"lr_scheduler_kwargs": {}}),
        ({"model_type": "bert", "config_overrides": "a=1,b=2"}, {"model_type": "bert", "config_overrides": "b=2,a=1"}),
        ({"model_name_or_path": "base"}, {"model_name_or_path": "base/"}),
        ({"model_name_or_path": "base"}, {"model_name_or_path": "/moved/to/base"}),
        ({"model_name_or_path": "base", "base": "x"}, {"model_name_or_path": "/other", "base": "x"}),
        ({"model_name_or_path": "base", "base": "x"}, {"model_name_or_path": "/gone/base", "base": None}),
        ({"model_name_or_path": "b", "base": "x", "model_revision": "1"}, {"model_name_or_path": "b", "base": "x"}),
        ({"model_name_or_path": "b", "model_type": "bert"}, {"model_name_or_path": "b"}),
        ({}, {"manifest": {**MANIFEST, "checksum": "the same blocks of a corpus that moved"}}),
    ],
    ids=str,
)  # fmt: skip
def test_spelling_and_values_without_effect_do_not_count(tmp_path: Path, one: dict, other: dict):
    check_same_run(tmp_path, identity(**one), identity(**other))
    check_same_run(tmp_path, identity(**other), identity(**one))


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"max_steps": 9}, {"max_steps": 8}, "(max_steps 9 -> 8)"),
        ({"max_steps": 9}, {"max_steps": -1}, "(max_steps 9 -> -1)"),
        ({}, {"num_train_epochs": 2.0}, "num_train_epochs 3.0 -> 2.0"),
        ({}, {"adam_beta1": 0.5}, "adam_beta1 0.9 -> 0.5"),
        ({"optim": "sgd"}, {}, "(optim sgd -> adamw_torch_fused)"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 5}, {}, "warmup_steps"),
        ({"model_name_or_path": "b", "base": "x"}, {"model_name_or_path": "b", "base": "y"}, "model_name_or_path"),
        ({"model_name_or_path": "base"}, {"model_name_or_path": "other"}, "model_name_or_path base -> other"),
        ({"model_name_or_path": "base"}, {"model_type": "bert"}, "model_name_or_path base -> None"),
        ({"model_type": "bert"}, {"model_type": "roberta"}, "model_type bert -> roberta"),
        ({}, {"manifest": {**MANIFEST, "checksum": "n", "block_size": 64}}, "data m -> n"),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_an_effect_is_named(tmp_path: Path, one: dict, other: dict, named: str):
    with pytest.raises(CheckpointError) as caught:
        check_same_run(tmp_path, identity(**one), identity(**other))
    assert named in str(caught.value)


def test_differently_spelled_options_that_make_the_same_model_are_the_same(tmp_path: Path):
    (tmp_path / "model").mkdir()
    stored = {"hidden_size": 32, "model_type": "bert", "transformers_version": "5.1", "architectures": ["X"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    one, other = identity(config_name="here/a"), identity(model_type="bert", config_overrides="hidden_size=32")
    check_same_run(tmp_path, one, other, {**stored, "transformers_version": "5.2", "architectures": None})
    with pytest.raises(CheckpointError, match="config_name"):
        check_same_run(tmp_path, one, other, {**stored, "hidden_size": 64})


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path: Path):
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    here = identity(model_name_or_path="/new/place/base", base="x")
    saved = {key: value for key, value in here.items() if key not in ("base_model", "blocks")}
    check_same_run(run / "checkpoint-2", {**saved, "model_name_or_path": "/old/place/base"}, here)
    moved = identity(model_name_or_path="/new/place/base", base="x", manifest={**MANIFEST, "checksum": "again"})
    with pytest.raises(CheckpointError, match="data m -> again"):
        check_same_run(run / "checkpoint-2", saved, moved)
    (run / "data.json").write_text(json.dumps(MANIFEST))
    check_same_run(run / "checkpoint-2", saved, moved)


@pytest.mark.parametrize(("mask_unit", "says"), [("token", False), ("word", True), ("span", True)])
def test_words_that_an_earlier_version_masked_in_another_way_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture, mask_unit: str, says: bool
):
    here = identity(mask_unit=mask_unit)
    check_same_run(tmp_path, here, here)
    assert capsys.readouterr().err == ""
    check_same_run(tmp_path, {key: value for key, value in here.items() if key != "blocks"}, here)
    assert ("is of an earlier version, whose words in scripts without spaces" in capsys.readouterr().err) == says


def test_a_base_model_is_known_by_what_its_files_hold(tmp_path: Path):
    def make(folder: Path, weights: bytes = b"w", version: str = "5.1", size: int = 2) -> str | None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"hidden_size": size, "transformers_version": version}))
        (folder / "model.safetensors").write_bytes(weights)
        return base_checksum(TrainConfig(output_dir="x", model_name_or_path=str(folder)))

    one = make(tmp_path / "a")
    assert one is not None
    assert make(tmp_path / "b", version="5.2") == one
    assert make(tmp_path / "c", weights=b"v") != one
    assert make(tmp_path / "d", size=3) != one
    assert base_checksum(TrainConfig(output_dir="x", model_name_or_path=str(tmp_path / "nowhere"))) is None
    assert base_checksum(TrainConfig(output_dir="x")) is None


def test_a_file_of_the_hubs_cache_is_not_read_again(tmp_path: Path):
    """The cache names it by the SHA-256 of what it holds."""
    import hashlib

    local, snapshot, blobs = tmp_path / "local", tmp_path / "snapshots" / "r", tmp_path / "blobs"
    for folder in (local, snapshot, blobs):
        folder.mkdir(parents=True)
    for folder in (local, snapshot):
        (folder / "config.json").write_text("{}")
    (local / "model.safetensors").write_bytes(b"w")
    (blobs / hashlib.sha256(b"w").hexdigest()).write_bytes(b"not read")
    os.symlink(blobs / hashlib.sha256(b"w").hexdigest(), snapshot / "model.safetensors")
    checksums = {
        base_checksum(TrainConfig(output_dir="x", model_name_or_path=str(folder))) for folder in (local, snapshot)
    }
    assert len(checksums) == 1


def test_a_manifest_in_the_run_folder_stands_for_the_blocks_only_if_the_checkpoint_was_made_with_it(tmp_path: Path):
    """Checkpoints of older versions record no checksum of the blocks."""
    saved = {key: value for key, value in identity().items() if key != "blocks"}
    here = identity(manifest={**MANIFEST, "checksum": "n"})
    for checksum in ("m", "other", None):
        (tmp_path / "data.json").write_text(json.dumps({**MANIFEST, "checksum": checksum}))
        if checksum == "m":
            check_same_run(tmp_path / "checkpoint-1", saved, here)
        else:
            with pytest.raises(CheckpointError, match="data m -> n"):
                check_same_run(tmp_path / "checkpoint-1", saved, here)


def test_streamed_data_have_no_checksum_of_blocks():
    assert blocks_checksum({"checksum": "m"}) is None


def test_the_first_rank_that_differs_is_named_with_its_host():
    one = {"seed": 1, "base_model": "x", "version of torch": "2.13"}
    check_equal(["a", "a", "b"], [one, {**one, "base_model": None}, one])
    with pytest.raises(LaunchError) as caught:
        check_equal(["a", "a", "b"], [one, {**one, "base_model": None}, {**one, "base_model": "y"}])
    assert "rank 2 on b has base_model y, but rank 0 on a has x" in str(caught.value)
    with pytest.raises(LaunchError, match=r"rank 1 on b has version of torch 2.12, but rank 0 on a has 2.13"):
        check_equal(["a", "b"], [one, {**one, "version of torch": "2.12"}])
    with pytest.raises(LaunchError, match="seed None"):
        check_equal(["a", "b"], [one, {key: value for key, value in one.items() if key != "seed"}])
