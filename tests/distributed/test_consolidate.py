"""A consolidated model is the trained model: every ZeRO stage, ties, tokenizer, and refusal of what is not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpus import TINY_MODEL
from ranks import ENGINES, cloze_ranks, succeed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, pipeline

from cloze.consolidate import choose_checkpoint, consolidate
from cloze.errors import CheckpointError, ConfigError
from cloze.files import parse_size
from cloze.train.checkpoint_files import read_manifest
from cloze.train.restore import PieceReader


def trained(prepared: Path, folder: Path, engine: str, *more: str) -> Path:
    """A run's folder with checkpoint-2, from two ranks."""
    flags = [*TINY_MODEL, "--max_steps", "2", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2", *more]
    flags += ["--dataset_name", str(prepared), "--output_dir", str(folder / "run")]
    succeed(cloze_ranks(["train", *flags], 2, engine, folder / "log"))
    return folder / "run"


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ZeRO-3 run that tests may read."""
    return trained(prepared, tmp_path_factory.mktemp("zero3"), "zero3")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_consolidates_to_the_training_models_answers(prepared: Path, tmp_path: Path, engine: str):
    folder = trained(prepared, tmp_path, engine)
    difference = consolidate(folder / "checkpoint-2", folder / "model", 10**9)
    assert difference < 1e-5
    model = AutoModelForMaskedLM.from_pretrained(folder / "model")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with PieceReader(folder / "checkpoint-2", read_manifest(folder / "checkpoint-2")) as pieces:
        for name, parameter in model.named_parameters():
            assert torch.equal(pieces.read(name, "weight").view(parameter.shape), parameter), name
    assert sorted(path.name for path in folder.iterdir() if "tmp" in path.name or "new" in path.name) == []


def test_bf16_training_gives_fp32_weights(prepared: Path, tmp_path: Path):
    folder = trained(prepared, tmp_path, "zero2", "--bf16")
    consolidate(folder / "checkpoint-2", folder / "model", 10**9)
    weights = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor.bfloat16().float(), tensor) for tensor in weights.values())


def test_the_folder_is_all_a_pipeline_needs(run: Path, tmp_path: Path):
    consolidate(run / "checkpoint-2", tmp_path / "model", 10**9)
    fill = pipeline("fill-mask", str(tmp_path / "model"))
    assert len(fill("The Milky Way is a <mask> galaxy.", top_k=3)) == 3
    assert "fill-mask" in (tmp_path / "model" / "README.md").read_text()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["RobertaForMaskedLM"]


def test_large_models_are_written_in_several_files(run: Path, tmp_path: Path):
    consolidate(run / "checkpoint-2", tmp_path / "one", 10**9)
    consolidate(run / "checkpoint-2", tmp_path / "many", parse_size("50KB", "--max_shard_size"))
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2
    assert all(path.stat().st_size < 100_000 for path in (tmp_path / "many").glob("*.safetensors"))
    one, many = (AutoModelForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_checkpoint_with_other_weights_than_it_trained_is_not_called_done(run: Path, tmp_path: Path):
    """The checksums agree, but the probe's logits do not: the model is refused and nothing is left."""
    from cloze.files import sha256
    from cloze.train.checkpoint_files import write_manifest

    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / "rank-00001.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layer.1.attention.output.dense.weight:weight" in name)
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file)
    manifest = read_manifest(tmp_path / "checkpoint-2")
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_manifest(tmp_path / "checkpoint-2", manifest)
    with pytest.raises(CheckpointError, match="does not answer as the training model did"):
        consolidate(tmp_path / "checkpoint-2", tmp_path / "model", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(run: Path, tmp_path: Path, capsys):
    for number in (1, 2):
        shutil.copytree(run / "checkpoint-2", tmp_path / f"checkpoint-{number}")
    file = tmp_path / "checkpoint-2" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert choose_checkpoint(tmp_path).name == "checkpoint-1"
    assert str(file) in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: damaged"):
        choose_checkpoint(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("size", ["", "5", "5XB", "-1GB", "0MB"])
def test_sizes_that_make_no_sense_are_refused(size: str):
    if size == "5":
        assert parse_size(size, "--max_shard_size") == 5
    else:
        with pytest.raises(ConfigError):
            parse_size(size, "--max_shard_size")
    assert parse_size("1.5 kb", "--max_shard_size") == 1500
