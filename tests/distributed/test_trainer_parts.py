"""Cloze's parts in other hands: blocks, masks and the masked-only head with transformers' Trainer."""

from __future__ import annotations

import copy
import runpy
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT
from small_models import build
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, Trainer, TrainingArguments, set_seed

import cloze
from cloze.cli.commands.prepare import run as prepare
from cloze.config import PrepareConfig
from cloze.data.batches.make_batch import make_batch
from cloze.data.batches.masking import Masking
from cloze.data.prepared.shards import open_prepared
from cloze.errors import ConfigError, DataError, ModelError


@pytest.fixture(scope="module")
def packed(prepared: Path) -> Path:
    """The same corpus with documents kept whole."""
    source = {"dataset_name": str(prepared.parent / "corpus.jsonl"), "text_field": "answers.text"}
    folder = prepared.parent / "packed"
    prepare(
        PrepareConfig(
            **source, tokenizer_name=str(prepared.parent / "tokenizer"), output=str(folder), packing="best_fit",
            block_size=64, num_proc=1,
        )
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masks_are_those_of_cloze_train(prepared: Path, unit: str):
    dataset = cloze.PackedDataset(prepared)
    dataset.set_epoch(2)
    collate = cloze.MaskingCollator(dataset.tokenizer, mask_unit=unit, seed=9, mlm_probability=0.3)
    batch = collate([dataset[5], dataset[-1], dataset[0]])
    blocks = open_prepared(prepared).blocks("train")
    words = {"token": {}, "word": {"words": collate.masking.words}, "span": {"words": collate.masking.words}}[unit]
    rule = Masking.from_manifest(dataset.prepared.manifest, 9, 0.3, **words, spans=unit == "span")
    indices = np.array([5, len(dataset) - 1, 0])
    expected = make_batch(blocks.read(indices), None, rule, 2 * len(dataset) + indices, 10**9)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["labels"], expected["labels"])
    assert batch.keys() == {"input_ids", "labels"}


def test_a_samples_mask_depends_on_nothing_but_seed_and_epoch(prepared: Path):
    dataset = cloze.PackedDataset(prepared)

    def masks(epoch: int, seed: int = 42, **loading: Any) -> dict[tuple, list]:
        dataset.set_epoch(epoch)
        collate = cloze.MaskingCollator(dataset.tokenizer, seed=seed)
        found: dict[tuple, list] = {}
        for batch in DataLoader(dataset, collate_fn=collate, **loading):
            whole = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
            for row, labels in zip(whole.tolist(), batch["labels"].tolist(), strict=True):
                found.setdefault(tuple(row), []).append(labels)
        return {row: sorted(labels) for row, labels in found.items()}  # some blocks are equal

    one = masks(0, batch_size=8)
    torch.manual_seed(5)
    assert masks(0, batch_size=3, shuffle=True) == one
    assert masks(1, batch_size=8) != one
    assert masks(0, seed=43, batch_size=8) != one


def test_examples_without_a_number_follow_torchs_seed_and_shorter_ones_are_padded(prepared: Path):
    tokenizer = cloze.PackedDataset(prepared).tokenizer
    collate = cloze.MaskingCollator(tokenizer, mlm_probability=0.5)
    examples = [{"input_ids": list(range(10, 50))}, {"input_ids": list(range(10, 30))}]
    torch.manual_seed(1)
    first, second = collate(examples), collate(examples)
    torch.manual_seed(1)
    again = collate(examples)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], second["labels"])
    assert first["attention_mask"].tolist() == [[1] * 40, [1] * 20 + [0] * 20]
    assert (first["input_ids"][1, 20:] == tokenizer.pad_token_id).all()
    assert (first["labels"][1, 20:] == -100).all()
    assert (first["labels"][1, :20] != -100).any()


def test_packed_documents_are_kept_apart_or_refused(packed: Path):
    dataset = cloze.PackedDataset(packed)
    first = next(i for i in range(len(dataset)) if dataset[i]["segments"][32] > 0)  # there are two documents in it
    examples = [dataset[first], dataset[first + 1]]
    with pytest.raises(DataError, match=r"documents=cloze\.documents_apart"):
        cloze.MaskingCollator(dataset.tokenizer)(examples)
    model = build(packed, "roberta")
    batch = cloze.MaskingCollator(dataset.tokenizer, documents=cloze.documents_apart(model, dataset))(examples)
    segments = torch.stack([example["segments"] for example in examples])
    together = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    length = int((segments[0] == 0).sum())
    assert length < dataset.block_size
    alone = model(input_ids=batch["input_ids"][:1, :length]).logits
    torch.testing.assert_close(together[:1, :length], alone, rtol=1e-4, atol=1e-4)
    assert cloze.documents_apart(model, cloze.PackedDataset(packed.parent / "prepared")) is None


@pytest.mark.parametrize(
    "values",
    [{"mask_unit": "letter"}, {"mlm_probability": 0.0}, {"mask_replace_prob": 0.9, "random_replace_prob": 0.2}],
    ids=str,
)
def test_masks_that_cannot_be_are_refused(prepared: Path, values: dict[str, Any]):
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    with pytest.raises(ConfigError):
        cloze.MaskingCollator(tokenizer, **values)


def test_items_are_blocks_and_nothing_else(prepared: Path):
    dataset = cloze.PackedDataset(cloze.Prepared(prepared, open_prepared(prepared).manifest), split="validation")
    assert len(dataset[0]["input_ids"]) == dataset.block_size == 32
    assert isinstance(dataset[0], Mapping)
    assert not isinstance(dataset[0], dict)  # else Trainer would remove `sample`
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(DataError, match="no split 'test'"):
        cloze.PackedDataset(prepared, split="test")


def trained(prepared: Path, model_type: str, sparse: bool, folder: Path, **more: Any) -> tuple[list, dict, Any]:
    """A Trainer run of 4 steps: losses, final weights, evaluation loss."""
    dataset = cloze.PackedDataset(prepared)
    model = build(prepared, model_type)
    if sparse:
        assert cloze.sparse_head(cloze.sparse_head(model)) is model
    set_seed(1)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-3, **more,
    )  # fmt: skip
    validation = torch.utils.data.Subset(cloze.PackedDataset(prepared, "validation"), range(8))
    trainer = Trainer(
        model, arguments, train_dataset=dataset, eval_dataset=validation,
        data_collator=cloze.MaskingCollator(dataset.tokenizer, mlm_probability=0.3),
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, model.state_dict(), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("model_type", "accumulation"),
    [("roberta", 1), ("modernbert", 2), *(pytest.param(t, 2, marks=pytest.mark.slow) for t in ("bert", "deberta-v2"))],
)
def test_trainer_gives_the_same_losses_with_masked_rows_only(
    prepared: Path, tmp_path: Path, model_type: str, accumulation: int, figure: Any
):
    """Also where the model divides by the tokens of all accumulated batches (modernbert), and in evaluation."""
    more = {"gradient_accumulation_steps": accumulation}
    plain = trained(prepared, model_type, False, tmp_path, **more)
    sparse = trained(prepared, model_type, True, tmp_path, **more)
    assert len(plain[0]) == 4
    np.testing.assert_allclose(sparse[0], plain[0], rtol=1e-5)
    assert abs(sparse[2] / plain[2] - 1) < 1e-5
    figure("Trainer, masked rows only against all: loss", max(abs(np.array(sparse[0]) / plain[0] - 1)))
    assert sparse[1].keys() == plain[1].keys()
    for name, weight in plain[1].items():
        torch.testing.assert_close(sparse[1][name], weight, rtol=1e-3, atol=2e-4)


def test_only_masked_rows_reach_the_head_and_only_while_training(prepared: Path):
    model = cloze.sparse_head(build(prepared, "roberta"))
    ids = torch.full((2, 16), 7)
    labels = torch.full((2, 16), -100)
    labels[0, 3] = labels[1, 5] = 9
    vocabulary = model.config.vocab_size
    assert model.train()(input_ids=ids, labels=labels).logits.shape == (1, 8, vocabulary)
    assert model.train()(input_ids=ids).logits.shape == (2, 16, vocabulary)
    assert model.eval()(input_ids=ids, labels=labels).logits.shape == (2, 16, vocabulary)
    assert copy.deepcopy(model).train()(input_ids=ids, labels=labels).logits.shape == (1, 8, vocabulary)
    assert torch.isnan(model.train()(input_ids=ids, labels=torch.full((2, 16), -100)).loss)  # as without it


def test_a_model_whose_loss_would_be_another_is_refused_and_left_as_it_was(prepared: Path):
    with pytest.raises(ModelError, match="its decoder reads the labels"):
        cloze.sparse_head(build(prepared, "bart"))
    model = build(prepared, "roberta")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden - hidden.mean(dim=1, keepdim=True))  # rows are mixed
    with pytest.raises(ModelError, match="gives another loss"):
        cloze.sparse_head(model)
    ids = torch.full((2, 16), 7)
    assert model.train()(input_ids=ids, labels=ids).logits.shape[:2] == (2, 16)


@pytest.mark.slow
def test_the_loss_is_the_models_own_for_every_architecture(prepared: Path, figure: Any):
    """Or it is refused: of those without an encoder-decoder, none is."""
    from architectures import ARCHITECTURES

    for model_type in ARCHITECTURES:
        model = build(prepared, model_type)
        batch = cloze.MaskingCollator(cloze.PackedDataset(prepared).tokenizer)(
            [cloze.PackedDataset(prepared)[number] for number in range(4)]
        )
        if model.config.is_encoder_decoder:
            with pytest.raises(ModelError):
                cloze.sparse_head(model)
            continue
        losses = []
        for _ in range(2):
            torch.manual_seed(5)
            losses.append(float(model(**batch).loss))
            cloze.sparse_head(model)
        assert abs(losses[1] / losses[0] - 1) < 1e-5, model_type
        figure("model's own loss, masked rows only against all", abs(losses[1] / losses[0] - 1))


def test_the_example_with_trainer_shows_the_same_losses(prepared: Path, capsys: pytest.CaptureFixture[str]):
    example = runpy.run_path(str(ROOT / "launch/examples/with_trainer.py"))
    found = example["main"](["--dataset_name", str(prepared), "--max_steps", "4", "--use_cpu"])
    assert len(found["plain"]["losses"]) == 4
    np.testing.assert_allclose(found["sparse"]["losses"], found["plain"]["losses"], rtol=1e-5)
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_as_it_stands_packs_the_sample_corpus_itself():
    example = runpy.run_path(str(ROOT / "launch/examples/with_trainer.py"))
    found = example["main"](["--use_cpu"])
    assert len(found["plain"]["losses"]) == 20
    np.testing.assert_allclose(found["sparse"]["losses"], found["plain"]["losses"], rtol=1e-5)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_a_mask_does_not_depend_on_the_longest_row_of_the_batch(prepared: Path, unit: str):
    dataset = cloze.PackedDataset(prepared)
    collate = cloze.MaskingCollator(dataset.tokenizer, mask_unit=unit, seed=9, mlm_probability=0.3)
    ids = dataset[0]["input_ids"]
    examples = [{"input_ids": ids[:length], "sample": sample} for sample, length in enumerate((20, 32, 7, 20))]
    together = collate(examples)
    for row, example in enumerate(examples):
        alone, length = collate([example]), len(example["input_ids"])
        assert torch.equal(together["labels"][row, :length], alone["labels"][0])
        assert torch.equal(together["input_ids"][row, :length], alone["input_ids"][0])
        assert (together["labels"][row, length:] == -100).all()
        assert (together["input_ids"][row, length:] == dataset.tokenizer.pad_token_id).all()


def test_replicas_in_threads_do_not_disturb_each_other():
    """As torch.nn.DataParallel runs them: they share the hooks."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (8, 3):
        ids = torch.randint(5, 50, (2, 16), generator=generator)
        labels = torch.full_like(ids, -100)
        labels.view(-1)[torch.randperm(32, generator=generator)[:count]] = 7
        parts.append({"input_ids": ids, "labels": labels})
    expected = [float(model(**part).loss) for part in parts]
    model = cloze.sparse_head(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    both = threading.Barrier(2, timeout=60)
    model.bert.embeddings.register_forward_pre_hook(lambda *_: (both.wait(), None)[1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda part: float(model(**part).loss), parts))
    assert found == pytest.approx(expected, rel=1e-6)
