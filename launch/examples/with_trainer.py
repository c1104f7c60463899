"""Cloze's parts with transformers' Trainer: packed blocks, exact masks, and a head that computes masked rows only.

    python launch/examples/with_trainer.py                      # the sample corpus, a small RoBERTa, on any machine
    python launch/examples/with_trainer.py --dataset_name prepared/mine --model distilbert/distilroberta-base

Trains the same model on the same batches twice, as it is and with `cloze.sparse_head`, and compares losses and speed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM, RobertaConfig, Trainer, TrainingArguments, set_seed

import cloze


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train twice; return and print the losses and seconds of both."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        dataset = cloze.PackedDataset(options.dataset_name or prepare_sample(Path(folder), options))
        plain = train(options, dataset, Path(folder), sparse=False)
        sparse = train(options, dataset, Path(folder), sparse=True)
    for one, other in zip(plain["losses"], sparse["losses"], strict=True):
        print(f"loss {one:.6f} as it is, {other:.6f} with masked rows only")
    print(f"{plain['seconds'] / sparse['seconds']:.2f} times as fast")
    return {"plain": plain, "sparse": sparse}


def train(options: argparse.Namespace, dataset: cloze.PackedDataset, folder: Path, sparse: bool) -> dict[str, Any]:
    """A Trainer run: the loss of each step, and the seconds it took."""
    set_seed(1)
    model = make_model(options, dataset)
    collator = cloze.MaskingCollator(
        dataset.tokenizer, mask_unit=options.mask_unit, documents=cloze.documents_apart(model, dataset)
    )
    if sparse:
        cloze.sparse_head(model)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=8,
        max_steps=options.max_steps,
        learning_rate=5e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.use_cpu,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collator)
    seconds = trainer.train().metrics["train_runtime"]
    return {"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line], "seconds": seconds}


def make_model(options: argparse.Namespace, dataset: cloze.PackedDataset) -> Any:
    """Pretrained, or a small RoBERTa from random weights."""
    if options.model:
        return AutoModelForMaskedLM.from_pretrained(options.model)
    tokenizer = dataset.tokenizer
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=dataset.block_size + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModelForMaskedLM.from_config(config)


def prepare_sample(folder: Path, options: argparse.Namespace) -> cloze.Prepared:
    """The sample corpus as blocks of 64 tokens."""
    from cloze.tools.demo.corpus import write_corpus

    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, num_threads=options.num_threads)
    tokenizer = cloze.tokenizer(
        dataset_name=corpus, text_field="answers.text", vocab_size=4000, output=folder / "tokenizer"
    )
    return cloze.prepare(
        dataset_name=corpus,
        text_field="answers.text",
        tokenizer_name=tokenizer,
        output=folder / "prepared",
        block_size=64,
        packing=options.packing,
        validation_split_percentage=0,
        num_proc=1,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="a folder made by `cloze prepare` (default: the sample corpus)")
    parser.add_argument("--model", help="a pretrained model (default: a small RoBERTa)")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--num_threads", type=int, default=2000, help="of the sample corpus")
    parser.add_argument("--packing", choices=["concat", "best_fit"], default="best_fit")
    parser.add_argument("--mask_unit", choices=["token", "word", "span"], default="word")
    parser.add_argument("--use_cpu", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
