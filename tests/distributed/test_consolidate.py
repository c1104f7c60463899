"""A consolidated model is the trained model: every ZeRO stage, ties, tokenizer, and refusal of what is not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import synthetic
import torch
from architectures import ARCHITECTURES, BERT, TINY
from corpus import TINY_MODEL
from ranks import ENGINES, cloze_ranks, succeed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BartConfig, pipeline

from cloze.checkpoint.checksum import content_sum
from cloze.checkpoint.format import read_manifest, write_manifest
from cloze.checkpoint.probe import probe_difference
from cloze.checkpoint.reader import PieceReader
from cloze.cli.commands import consolidate as command
from cloze.config import ConsolidateConfig, ModelConfig
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import CheckpointError, ConfigError
from cloze.export.consolidation.model_folder import DTYPES, choose_checkpoint, choose_last, consolidate, tidy_config
from cloze.export.consolidation.stored import Stored
from cloze.model.load import read_config
from cloze.utils.atomic_files import parse_size, sha256


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


@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=pytest.mark.slow if engine == "fsdp2" else ()) for engine in ENGINES]
)
def test_every_engine_consolidates_to_the_training_models_answers(prepared: Path, tmp_path: Path, engine: str):
    folder = trained(prepared, tmp_path, engine)
    compared = consolidate(folder / "checkpoint-2", folder / "model", 10**9)
    assert compared.startswith("logits as in training")
    model = AutoModelForMaskedLM.from_pretrained(folder / "model")
    assert probe_difference(model, load_file(folder / "checkpoint-2" / "probe.safetensors")) < 1e-5
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with PieceReader(folder / "checkpoint-2", read_manifest(folder / "checkpoint-2")) as pieces:
        for name, parameter in model.named_parameters():
            assert torch.equal(pieces.read(name, "weight").view(parameter.shape), parameter), name
    assert sorted(path.name for path in folder.iterdir() if "tmp" in path.name or "new" in path.name) == []


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2"])  # three classes of DeepSpeed's
def test_bf16_training_gives_fp32_weights(prepared: Path, tmp_path: Path, engine: str):
    folder = trained(prepared, tmp_path, engine, "--bf16")
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


@pytest.mark.parametrize(
    ("sums_too", "message"), [(False, "was not written as it is stored"), (True, "does not answer as the training")]
)
def test_a_checkpoint_with_other_weights_than_it_trained_is_not_called_done(run, tmp_path, sums_too, message):
    """The files' checksums agree, but the tensors' do not; or those do too, but the probe's logits do not: the model
    is refused and nothing is left."""
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / "rank-00001.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "layer.1.attention.output.dense.weight:weight" in key)
    tensors[key] = tensors[key] + 0.5
    manifest = read_manifest(tmp_path / "checkpoint-2")
    for piece in manifest["pieces"]:
        if sums_too and (piece["file"], f"{piece['name']}:{piece['key']}") == (file.name, key):
            piece["sum"] = content_sum(tensors[key], piece["offset"])
    replace(file, tensors, manifest)
    with pytest.raises(CheckpointError, match=message):
        consolidate(tmp_path / "checkpoint-2", tmp_path / "model", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def replace(file: Path, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
    """Other tensors in a file of a checkpoint, with the file's checksum made to agree."""
    save_file(tensors, file)
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_manifest(file.parent, manifest)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_the_fp32_weights_rounded_once(run: Path, tmp_path: Path, dtype: str):
    compared = consolidate(run / "checkpoint-2", tmp_path / "model", 10**9, dtype)
    assert compared.startswith("logits as in training")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert model.dtype == DTYPES[dtype]
    expected = weights_at(run, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(expected[name].to(DTYPES[dtype]), parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_in_half_precision(prepared: Path, tmp_path: Path, model_type: str):
    config = ModelConfig(model_type=model_type, config_overrides=TINY.get(model_type, BERT))
    tokenizer = prepared.parent / "tokenizer"
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(read_config(config, load_tokenizer(str(tokenizer)), 32)).eval()
    synthetic.write_own(model, tokenizer, tmp_path / "checkpoint-1")
    compared = consolidate(tmp_path / "checkpoint-1", tmp_path / "model", 10**9, "bf16")
    assert compared.startswith("logits as in training")


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path):
    tensor = Stored("w", (3,), torch.float32, lambda: iter([(0, torch.tensor([1.0, 7e4, 2.0]))]), tmp_path)
    assert tensor.read(torch.bfloat16).isfinite().all()
    with pytest.raises(ConfigError, match="w has elements beyond 65504, the largest in fp16; use bf16"):
        tensor.read(torch.float16)


def test_a_tensor_with_a_gap_is_refused(tmp_path: Path):
    tensor = Stored("w", (2, 3), torch.float32, lambda: iter([(0, torch.ones(2)), (3, torch.ones(3))]), tmp_path)
    with pytest.raises(CheckpointError, match="5 of 6 elements of w are there"):
        tensor.read(torch.float32)


def test_the_configuration_says_the_type_and_nothing_of_generation(tmp_path: Path):
    values = BartConfig(d_model=16, forced_eos_token_id=7).to_dict()
    values |= {"num_beams": 4, "early_stopping": True, "task_specific_params": {"summarization": {"num_beams": 6}}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").write_text("{}")
    tidy_config(tmp_path, torch.bfloat16)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["dtype"] == "bfloat16"
    assert not {"num_beams", "early_stopping", "task_specific_params"} & kept.keys()
    assert (kept["d_model"], kept["forced_eos_token_id"], kept["model_type"]) == (16, 7, "bart")
    assert not (tmp_path / "generation_config.json").exists()


@pytest.fixture(scope="module")
def long_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints of one rank."""
    folder = tmp_path_factory.mktemp("long")
    flags = [*TINY_MODEL, "--max_steps", "4", "--save_steps", "1", "--learning_rate", "1e-3", "--dataset_name"]
    succeed(cloze_ranks(["train", *flags, str(prepared), "--output_dir", str(folder / "run")], 1, "single", folder))
    return folder / "run"


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    manifest = read_manifest(folder)
    with PieceReader(folder, manifest) as pieces:
        parameters = manifest["parameters"].items()
        return {name: pieces.read(name, "weight").view(facts["shape"]).clone() for name, facts in parameters}


def test_the_mean_of_the_last_checkpoints_is_their_mean(long_run: Path, tmp_path: Path, capsys):
    command.run(ConsolidateConfig(checkpoint=str(long_run), output=str(tmp_path / "model"), average=3))
    said = capsys.readouterr()
    assert "the mean of checkpoint-2, checkpoint-3 and checkpoint-4" in said.out + said.err
    assert "an average has no logits to compare with: loss" in said.out + said.err
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    last = [weights_at(long_run, step) for step in (2, 3, 4)]
    for name, parameter in model.named_parameters():
        mean = torch.stack([one[name].double() for one in last]).mean(0).float()
        assert torch.equal(parameter, mean), name


def test_a_damaged_checkpoint_is_left_out_of_the_mean_and_too_few_are_refused(long_run, tmp_path, capsys):
    for step in (1, 2, 3):
        shutil.copytree(long_run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    file = tmp_path / "checkpoint-2" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert [folder.name for folder in choose_last(tmp_path, 2)] == ["checkpoint-1", "checkpoint-3"]
    assert str(file) in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"2 good checkpoints .*--average 3"):
        choose_last(tmp_path, 3)


def test_checkpoints_of_runs_with_other_options_are_not_averaged(long_run: Path, tmp_path: Path):
    for step in (3, 4):
        shutil.copytree(long_run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    other = tmp_path / "run" / "checkpoint-3"
    manifest = read_manifest(other)
    write_manifest(other, {**manifest, "run": {**manifest["run"], "mlm_probability": 0.4, "optim": "adamw_torch"}})
    with pytest.raises(CheckpointError, match=r"belongs to another run than checkpoint-4 \(mlm_probability, "):
        command.run(ConsolidateConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "model"), average=2))


def test_a_mean_is_not_compared_if_one_checkpoint_stored_no_answers(long_run: Path, tmp_path: Path, capsys):
    for step in (3, 4):
        shutil.copytree(long_run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    file = tmp_path / "run" / "checkpoint-3" / "probe.safetensors"
    probe = load_file(file)
    nothing = {**probe, **{name: probe[name][:0].clone() for name in ("rows", "labels", "logits")}}
    replace(file, nothing, read_manifest(file.parent))
    command.run(ConsolidateConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "model"), average=2))
    assert "the stored batch holds no masked position, so no answers were compared" in capsys.readouterr().out


def test_weights_that_lie_too_far_apart_are_not_averaged(long_run: Path, tmp_path: Path):
    """Checkpoints that (by the answers stored with them) know the batch by heart, and a mean that does not: the model
    is refused before it has its name."""
    for step in (3, 4):
        folder = shutil.copytree(long_run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
        probe = load_file(folder / "probe.safetensors")
        right = torch.nn.functional.one_hot(probe["labels"].long(), probe["logits"].shape[-1]).float()
        replace(folder / "probe.safetensors", {**probe, "logits": 20 * right}, read_manifest(folder))
    with pytest.raises(CheckpointError, match="differ too much"):
        command.run(ConsolidateConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "model"), average=2))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(run: Path, tmp_path: Path, capsys):
    for number in (1, 2):
        folder = shutil.copytree(run / "checkpoint-2", tmp_path / f"checkpoint-{number}")
        manifest = read_manifest(folder)
        write_manifest(folder, {**manifest, "position": {**manifest["position"], "global_step": number}})
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
