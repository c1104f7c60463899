"""ZeRO checkpoints that Trainer, accelerate and DeepSpeed wrote become the model that was trained, to the bit, without
DeepSpeed, without running anything that is in them; what is damaged or missing is named."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import foreign
import pytest
import synthetic
import torch
from architectures import ARCHITECTURES, BERT, TINY
from foreign_conversion import DECODER, EMBEDDINGS, Attack, assert_trained, convert, written
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.cli.commands import consolidate
from cloze.config import ConsolidateConfig, ModelConfig
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import CheckpointError, ClozeError, ConfigError, ModelError
from cloze.export.consolidation.foreign import expected_tensors
from cloze.export.consolidation.zerofiles import ZeroFiles, verify_files
from cloze.model.load import read_config


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Path:
    return prepared.parent / "tokenizer"


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """accelerate's save_state on 3 ranks of ZeRO-3 in bf16."""
    return written(foreign.by_accelerate, tmp_path_factory.mktemp("accelerate"), 3, stage=3, precision="bf16")


@pytest.fixture(scope="module")
def zero1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed's save_checkpoint on 3 ranks of ZeRO-1 in bf16, with weights that are not tied."""
    state = {"arguments": argparse.Namespace(lr=1e-2)}
    folder = tmp_path_factory.mktemp("deepspeed")
    return written(foreign.by_deepspeed, folder, 3, stage=1, precision="bf16", tied=False, client_state=state)


def test_what_trainer_wrote_needs_no_more_than_its_folder(tokenizer: Path, tmp_path: Path, capsys):
    theirs = written(foreign.by_trainer, tmp_path, 2, stage=2, precision="fp32", tokenizer=str(tokenizer))
    for number, checkpoint in enumerate((theirs, theirs / "checkpoint-2", theirs / "checkpoint-2" / "global_step2")):
        convert(checkpoint, tmp_path / f"model-{number}")
        assert_trained(tmp_path / f"model-{number}", theirs)
    said = capsys.readouterr()
    assert "44 tensors are the engine's own of mp_rank_00_model_states.pt (float32)" in said.out + said.err
    assert DECODER not in load_file(tmp_path / "model-0" / "model.safetensors")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model-0")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_what_accelerate_wrote_is_put_together_from_the_padded_parts_of_zero3(zero3, tokenizer, tmp_path, capsys):
    convert(zero3, tmp_path / "model", tokenizer, zero3 / "config")
    assert_trained(tmp_path / "model", zero3)
    said = capsys.readouterr()
    assert "no second copy of the weights" in said.out + said.err


def test_what_deepspeed_wrote_keeps_apart_what_is_not_tied(zero1: Path, tokenizer: Path, tmp_path: Path, capsys):
    convert(zero1, tmp_path / "model", tokenizer, zero1 / "config", dtype="bf16")
    said = capsys.readouterr()
    assert (
        "tensors are the engine's own of mp_rank_00_model_states.pt (bfloat16), to its rounding" in said.out + said.err
    )
    weights = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
    truth = torch.load(zero1 / "truth.pt")
    assert all(torch.equal(weights[name], truth[name].bfloat16()) for name in truth.keys() & weights.keys())
    assert not torch.equal(weights[DECODER], weights[EMBEDDINGS])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_on_any_number_of_ranks(tmp_path, tokenizer, stage, precision, tied, world_size):
    theirs = written(foreign.by_deepspeed, tmp_path, world_size, stage=stage, precision=precision, tied=tied)
    convert(theirs, tmp_path / "model", tokenizer, theirs / "config")
    assert_trained(tmp_path / "model", theirs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_zero_the_engines_own_weights_are_taken_and_that_is_said(tmp_path, tokenizer, precision, capsys):
    theirs = written(foreign.by_deepspeed, tmp_path, 2, stage=0, precision=precision)
    convert(theirs, tmp_path / "model", tokenizer, theirs / "config")
    kind = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert f"the engine's own {kind} weights were taken" in capsys.readouterr().out
    assert_trained(tmp_path / "model", theirs)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture(prepared: Path, tokenizer: Path, tmp_path: Path, model_type: str):
    config = ModelConfig(model_type=model_type, config_overrides=TINY.get(model_type, BERT))
    model = AutoModelForMaskedLM.from_config(read_config(config, load_tokenizer(str(tokenizer)), 32))
    synthetic.write_zero3(model, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "model", tokenizer, tmp_path / "theirs" / "config")
    weights = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
    written = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(written.get(name, weights[name]), tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_other_stages_of_trainer(tokenizer: Path, tmp_path: Path, stage: int, precision: str):
    theirs = written(foreign.by_trainer, tmp_path, 2, stage=stage, precision=precision, tokenizer=str(tokenizer))
    convert(theirs, tmp_path / "model")
    assert_trained(tmp_path / "model", theirs)


def test_neither_deepspeed_nor_accelerate_is_imported_or_needed(zero3: Path, tokenizer: Path, tmp_path: Path):
    script = (
        "import sys\nsys.modules['deepspeed'] = None\nfrom pathlib import Path\n"
        "from cloze.export.consolidation.zerofiles import ZeroFiles\n"
        "files = ZeroFiles(Path(sys.argv[1]))\nassert len(files.trained) > 40\n"
        "assert 'accelerate' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(zero3 / "pytorch_model")], check=True)


def test_tying_what_was_trained_apart_is_refused(zero1: Path, tokenizer: Path, tmp_path: Path):
    config = AutoConfig.from_pretrained(zero1 / "config")
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "config")
    with pytest.raises(ConfigError, match=r"were trained apart; .* tie_word_embeddings: false"):
        convert(zero1, tmp_path / "model", tokenizer, tmp_path / "config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"roberta.encoder.layer.2.\S+ is not there; is \S+ \(--config_name\) the"),
        ({"num_hidden_layers": 1}, r"roberta.encoder.layer.1.\S+ is no part of the model"),
        ({"intermediate_size": 18}, r"has shape \(17, 12\), but \(18, 12\) by the configuration"),
        ({"model_type": "gpt2"}, r"no masked language model can be made"),
    ],
    ids=str,
)
def test_another_models_configuration_is_refused(zero3: Path, tokenizer: Path, tmp_path: Path, change, message):
    values = AutoConfig.from_pretrained(zero3 / "config").to_dict() | change
    (AutoConfig.for_model(**values)).save_pretrained(tmp_path / "config")
    with pytest.raises(ClozeError, match=message):
        convert(zero3, tmp_path / "model", tokenizer, tmp_path / "config")
    assert not (tmp_path / "model").exists()


def test_what_is_missing_on_the_command_line_is_asked_for(zero3: Path, tokenizer: Path, tmp_path: Path):
    for given, message in (
        ({}, "give --config_name"),
        ({"config": zero3 / "config"}, "--tokenizer_name: there is no tokenizer"),
        (
            {"config": zero3 / "config", "tokenizer": tokenizer, "average": 2},
            "--average: only for checkpoints of Cloze",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(zero3, tmp_path / "model", **given)
    with pytest.raises(ConfigError, match="--output"):
        consolidate.run(ConsolidateConfig(checkpoint=str(zero3)))


def test_a_tokenizer_with_more_tokens_than_the_model_or_with_none_is_refused(zero3, tokenizer, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: there is no tokenizer"):
        convert(zero3, tmp_path / "model", tmp_path / "empty", zero3 / "config")
    config = AutoConfig.from_pretrained(zero3 / "config")
    config.vocab_size = 599
    config.save_pretrained(tmp_path / "config")
    with pytest.raises(ModelError, match="the tokenizer has 600 tokens, but the model has embeddings for 599"):
        convert(zero3, tmp_path / "model", tokenizer, tmp_path / "config")


def copied(theirs: Path, folder: Path) -> Path:
    tag = (theirs / "latest").read_text()
    return shutil.copytree(theirs / tag, folder / "copy")


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_rank_that_is_missing_or_cut_short_or_has_a_flipped_bit_is_named(zero3, tmp_path, rank: int, kind: str):
    prefix = "bf16_zero_pp" if kind == "optim" else "zero_pp"
    name = f"{prefix}_rank_{rank}_mp_rank_00_{kind}_states.pt"
    files = copied(zero3, tmp_path)
    whole = (files / name).read_bytes()
    with zipfile.ZipFile(files / name) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    at = largest.header_offset + 200  # past its name and alignment
    for content in (whole[: len(whole) // 2], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        (files / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: rank {rank}'s file is damaged"):
            verify_files(files)
    (files / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: rank {rank}'s file (of 3 )?is missing"):
        ZeroFiles(files)


def test_a_last_rank_that_is_missing_is_named_where_only_the_others_know_of_it(zero1: Path, tmp_path: Path):
    files = copied(zero1, tmp_path)
    name = "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    (files / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: rank 2's file of 3 is missing"):
        ZeroFiles(files)


def test_files_of_ranks_that_are_too_many_are_noticed(zero3: Path, tmp_path: Path):
    files = copied(zero3, tmp_path)
    for kind, prefix in (("optim", "bf16_zero_pp"), ("model", "zero_pp")):
        shutil.copy(
            files / f"{prefix}_rank_2_mp_rank_00_{kind}_states.pt",
            files / f"{prefix}_rank_3_mp_rank_00_{kind}_states.pt",
        )
    with pytest.raises(CheckpointError, match="4 ranks' files are there, but 3 ranks wrote it"):
        ZeroFiles(files)


def test_latest_that_names_nothing_is_named(tmp_path: Path):
    (tmp_path / "latest").write_text("global_step9\n")
    with pytest.raises(CheckpointError, match=r"latest: .*global_step9"):
        convert(tmp_path, tmp_path / "model")


def test_nothing_that_lies_in_a_file_is_run(zero1: Path, tmp_path: Path):
    files = copied(zero1, tmp_path)
    file = files / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file, weights_only=False), "surprise": Attack(tmp_path / "ran")}, file)
    with pytest.raises(ConfigError, match=r"rank 0's file .*posix.system"):
        ZeroFiles(files)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_moment_than_the_engines_are_noticed(zero1: Path, tokenizer: Path, tmp_path: Path):
    files = copied(zero1, tmp_path)
    file = files / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["module"]["lm_head.dense.weight"][3, 3] += 0.125
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"lm_head.dense.weight in fp32"):
        convert(files, tmp_path / "model", tokenizer, zero1 / "config")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_the_tensors_of_a_model_are_known_without_making_it():
    """600 billion parameters, in no memory."""
    config = AutoConfig.for_model("bert", hidden_size=65536, num_hidden_layers=12, num_attention_heads=64)
    shapes, tied, name = expected_tensors(config)
    assert name == "BertForMaskedLM"
    assert shapes["bert.embeddings.word_embeddings.weight"] == (30522, 65536)
    assert tied["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
