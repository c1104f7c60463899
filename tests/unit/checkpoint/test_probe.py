"""The batch that is stored with a checkpoint always checks something, and takes little memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from cloze.checkpoint.format import PROBE
from cloze.checkpoint.probe import probe_difference, stored_loss
from cloze.data.batches.masking import Masking
from cloze.errors import CheckpointError
from cloze.export.consolidation.stored import _check_logits, _check_loss
from cloze.model.sparse_head import MaskedHead, check_head, checked_length
from cloze.training.checkpointing.engine_probe import MAX_ROWS, answer_probe, check_probe, make_probe


def masking(seed: int, rate: float = 0.15) -> Masking:
    return Masking(4, 100, (0, 1, 2, 3, 4), seed=seed, mlm_probability=rate)


def blocks_of(size: int, count: int = 2) -> np.ndarray:
    blocks = np.full((count, size), 9, np.int32)
    blocks[:, 0], blocks[:, -1] = 0, 2
    return blocks


def tiny(vocab: int = 100) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=vocab, max_position_embeddings=600, **sizes)).eval()


def engine_of(model: torch.nn.Module) -> SimpleNamespace:
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    return SimpleNamespace(model=model, accelerator=accelerator)


@pytest.mark.parametrize(("size", "rate"), [(3, 0.15), (8, 0.15), (32, 0.15), (128, 0.02)])
def test_every_block_has_a_position_that_can_be_masked_whatever_the_seed(size: int, rate: float):
    for seed in range(100):
        probe = make_probe(blocks_of(size), masking(seed, rate))
        assert {int(row) // size for row in probe["rows"]} == {0, 1}
        assert (probe["labels"] == 9).all()
        assert 2 <= len(probe["rows"]) <= MAX_ROWS


def test_a_block_of_special_tokens_is_predicted_as_it_is():
    blocks = blocks_of(8)
    blocks[1] = 1
    probe = make_probe(blocks, masking(0))
    assert [int(row) for row in probe["rows"] if row >= 8] == [12]
    assert (probe["input_ids"][1] == 1).all()


def test_only_masked_positions_of_one_block_at_a_time_go_through_the_head():
    model, seen = tiny(), []
    head = MaskedHead(model)
    model.cls.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[:2])))
    probe = make_probe(blocks_of(512), masking(0))
    answers = answer_probe(engine_of(model), head, probe)
    assert seen == [(1, MAX_ROWS // 2)] * 2
    dense = model.eval()(probe["input_ids"]).logits.reshape(-1, 100)[probe["rows"]]
    assert torch.allclose(answers["logits"], dense, atol=1e-5)
    assert probe_difference(tiny(), answers) < 1e-5


def test_the_head_is_checked_on_few_scores():
    model, seen = tiny(vocab=2**17), []
    model.cls.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    head = MaskedHead(model)
    check_head(head, model, {"input_ids": torch.full((2, 512), 9)}, "no")
    assert head.sparse
    assert max(seen) == 2**25
    assert checked_length(BertConfig(vocab_size=100), 2, 512) == 512


@pytest.mark.parametrize("vocab", [1, 50_000, 10**6])
def test_some_tokens_are_always_checked(vocab: int):
    assert checked_length(BertConfig(vocab_size=vocab), 2, 8192) >= 128


def answered(model: BertForMaskedLM) -> dict[str, torch.Tensor]:
    return answer_probe(engine_of(model), MaskedHead(model), make_probe(blocks_of(8), masking(0)))


def stored(folder: Path, **changes: torch.Tensor) -> Path:
    """A folder with the probe of `tiny`, and some tensors of it replaced."""
    answers = answered(tiny())
    save_file({**answers, **changes}, folder / PROBE)
    return folder


def test_answers_that_are_not_finite_are_refused(tmp_path: Path):
    model = tiny()
    rows = len(make_probe(blocks_of(8), masking(0))["rows"])
    folder = stored(tmp_path, logits=torch.full((rows, 100), float("nan")))
    for check in (
        lambda: check_probe(engine_of(model), MaskedHead(model), folder, "no"),
        lambda: _check_logits([folder], "no", "weight", model),
    ):
        with pytest.raises(CheckpointError, match="were not finite"):
            check()
    with pytest.raises(CheckpointError, match="loss of"):
        _check_loss([folder], "no", "weight", model)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    model, folder = tiny(), stored(tmp_path)
    assert check_probe(engine_of(model), MaskedHead(model), folder, "no") > 0
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[9] = float("nan")
    with pytest.raises(CheckpointError):
        check_probe(engine_of(model), MaskedHead(model), folder, "no")
    with pytest.raises(CheckpointError):
        _check_logits([folder], "no", "weight", model)


def test_an_older_probe_without_a_position_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny()
    empty = {"rows": torch.zeros(0, dtype=torch.long), "labels": torch.zeros(0, dtype=torch.long)}
    folder = stored(tmp_path, **empty, logits=torch.zeros(0, 100))
    assert check_probe(engine_of(model), MaskedHead(model), folder, "no") == 0.0
    assert "no masked position" in capsys.readouterr().err
    assert "no masked position" in _check_logits([folder], "no", "weight", model)
    assert "no masked position" in _check_loss([folder], "no", "weight", model)


def test_the_loss_is_of_the_stored_answers():
    answers = answered(tiny())
    assert stored_loss(answers) == pytest.approx(float(np.log(100)), abs=0.5)


def test_the_head_is_checked_without_dropout_and_the_model_trains_on():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=100, hidden_dropout_prob=0.5, **sizes)).train()
    head = MaskedHead(model)
    check_head(head, model, {"input_ids": torch.full((2, 32), 9)}, "no")
    assert head.sparse
    assert model.training
