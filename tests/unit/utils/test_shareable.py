"""What is only true on this machine stays here."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from cloze.checkpoint.identity import check_same_run
from cloze.config import TrainConfig
from cloze.errors import CheckpointError
from cloze.utils.shareable import basename_paths, is_place, shareable_config, split_secrets, with_secrets


def test_paths_keep_their_last_part_and_everything_else_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert basename_paths(["/home/me/start", "~/x", "../up/y", "./z", "data/mine"]) == ["start", "x", "y", "z", "mine"]
    same = ["distilbert/distilroberta-base", "roberta", "train[:10%]", ".*embeddings", "a=1,b=[2]", 7, None, True, 0.5]
    assert basename_paths({"all": same}) == {"all": same}
    assert not is_place("owner/name")


def test_a_configuration_loses_its_secrets_and_its_places():
    secret = {"token": "hf_a", "hub_token": "hf_b", "output_dir": "runs/x", "cache_dir": "/c", "run_name": "host-17"}
    secret |= {"prepared_cache_dir": "/d", "resume_from_checkpoint": "auto"}
    assert shareable_config(secret | {"seed": 7, "deepspeed": "/home/me/zero2.json"}) == {
        "seed": 7,
        "deepspeed": "zero2.json",
    }


def test_secrets_go_to_a_process_of_ones_own_beside_its_configuration(monkeypatch: pytest.MonkeyPatch):
    config = TrainConfig(output_dir="runs/x", token="hf_a", hub_token="hf_b", seed=7)
    values, secrets = split_secrets(dataclasses.asdict(config))
    assert "hf_" not in str(values)
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert with_secrets(TrainConfig(**values)) == config
    assert not secrets.keys() & os.environ.keys()
    assert with_secrets(TrainConfig(**values)).token is None
    assert with_secrets(config) == config


def test_a_checkpoint_from_the_hub_belongs_to_the_run_whose_paths_it_has_lost(tmp_path: Path):
    here = {"model_name_or_path": "/home/me/start", "seed": 7}
    check_same_run(tmp_path, basename_paths(here), here)
    with pytest.raises(CheckpointError, match="model_name_or_path other -> /home/me/start"):
        check_same_run(tmp_path, {"model_name_or_path": "other", "seed": 7}, here)
