"""Small corpora, tokenizers and models, and runs of Cloze on them, for comparison with the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ranks import cloze_ranks
from recording import record, stop_at
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from cloze.checkpoint.format import read_manifest
from cloze.checkpoint.reader import PieceReader
from cloze.cli.commands import prepare, tokenizer
from cloze.config import PrepareConfig, TokenizerConfig
from cloze.tools.demo.corpus import write_corpus
from reference.packing import Block, best_fit, concat

BLOCK = 32
_BERT_LIKE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 1, "decoder_ffn_dim": 24}
# Layers inside of one hidden unit have a bias of one element.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {**_BERT_LIKE, "intermediate_size": 1},
    "roberta": _BERT_LIKE,
    "modernbert": {**_BERT_LIKE, "num_hidden_layers": 3, "local_attention": 8, "initializer_cutoff_factor": 9.0},
    "bart": {**_BART, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "init_std": 0.1},
    "deberta-v2": {**_BERT_LIKE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "electra": {**_BERT_LIKE, "embedding_size": 8},
}
KIND = {"bert": "wordpiece", "electra": "wordpiece"}  # of the tokenizer; byte-level BPE of the others


@dataclass(frozen=True)
class Corpus:
    """Texts in files, each of which is a unit of work, and the folder of a tokenizer of each kind."""

    folder: Path
    texts: list[str]

    def tokenizer(self, kind: str) -> Any:
        """Return a tokenizer as transformers loads it."""
        return AutoTokenizer.from_pretrained(self.folder / kind)

    def documents(self, kind: str, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts, special tokens included."""
        return list(self._loaded[kind](texts)["input_ids"])

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {kind: self.tokenizer(kind) for kind in ("bpe", "wordpiece")}


def make_corpus(folder: Path) -> Corpus:
    """Write a corpus and train its tokenizers."""
    write_corpus(folder / "all.jsonl", num_threads=60)
    records = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    texts = [text for record in records for text in record["answers"]["text"] if text.isascii()]
    for kind, size in (("bpe", 400), ("wordpiece", 300)):
        source = {"dataset_name": str(folder / "all.jsonl"), "text_field": "answers.text"}
        tokenizer.run(TokenizerConfig(**source, output=str(folder / kind), kind=kind, vocab_size=size))
    return Corpus(folder, texts)


def fill(corpus: Corpus, kind: str, num_blocks: int, packing: str) -> tuple[Path, list[Block]]:
    """Return a folder prepared of texts that fill exactly so many blocks with `concat`, and the blocks expected."""
    texts, tokens = [], 0
    for text in corpus.texts:
        words = text.split(" ")
        while tokens + len(corpus.documents(kind, [" ".join(words)])[0]) >= (num_blocks + 1) * BLOCK:
            words.pop()
        texts.append(" ".join(words))
        tokens += len(corpus.documents(kind, [texts[-1]])[0])
        if tokens >= num_blocks * BLOCK:
            break
    folder = corpus.folder / f"{kind}-{num_blocks}-{packing}"
    if not folder.exists():
        prepare_blocks(corpus, kind, folder, [texts], packing)
    return folder, packed(corpus, kind, [texts], packing)


def prepare_blocks(corpus: Corpus, kind: str, output: Path, units: list[list[str]], packing: str, **more: Any) -> Path:
    """Run `cloze prepare` on texts, a file for each unit."""
    source = output.with_name(f"{output.name}-corpus")
    source.mkdir(parents=True)
    for number, unit in enumerate(units):
        lines = [json.dumps({"text": text}) + "\n" for text in unit]
        (source / f"{number:02d}.jsonl").write_text("".join(lines))
    sizes = [file.stat().st_size for file in sorted(source.iterdir())]
    largest = max(sizes)
    assert all(one + other > largest for one, other in pairwise(sizes)), "files would share a unit"
    options = {"block_size": BLOCK, "packing": packing, "num_proc": 1, "unit_size": str(largest), **more}
    names = {"dataset_name": str(source), "tokenizer_name": str(corpus.folder / kind), "output": str(output)}
    prepare.run(PrepareConfig(**names, **{"validation_split_percentage": 0.0, **options}))
    return output


def packed(corpus: Corpus, kind: str, units: list[list[str]], packing: str) -> list[Block]:
    """Return what the reference makes of the same texts."""
    documents = [corpus.documents(kind, unit) for unit in units]
    return best_fit(documents, BLOCK) if packing == "best_fit" else [[b] for b in concat(documents, BLOCK)]


def make_model(architecture: str, corpus: Corpus) -> Path:
    """Return the folder of a model with random weights and its tokenizer."""
    folder = corpus.folder / architecture
    if folder.exists():
        return folder
    tokens = corpus.tokenizer(KIND.get(architecture, "bpe"))
    ids = {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id")}
    ids = {name: token for name, token in ids.items() if token is not None}
    config = AutoConfig.for_model(architecture, **{"initializer_range": 0.1, **ARCHITECTURES[architecture], **ids})
    config.vocab_size = len(tokens)
    config.max_position_embeddings = BLOCK + 8
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms of their own, so that each of them has a part in the result
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    """Return the model with its initial weights, without kernels that fuse attention."""
    return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")


@dataclass(frozen=True)
class Split:
    """How a run is computed: engine, ranks, and the blocks of a micro-batch."""

    engine: str
    ranks: int
    per_device: int


def train(model: Path, data: Path, output: Path, split: Split, flags: dict[str, Any], stop: int | None = None) -> None:
    """Run `cloze train` from the newest checkpoint, if any, to the end, or until a stop request after `stop` steps.
    What each rank is given is recorded in output-seen."""
    words = ["train", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    options = {"logging_steps": 1, "save_steps": 1000, "resume_from_checkpoint": "auto", **flags}
    for name, value in {**options, "per_device_train_batch_size": split.per_device}.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    seen, log = output.with_name(f"{output.name}-seen"), output.with_name(f"{output.name}-log")
    before = record(seen, None if stop is None else stop_at(stop - 1, 0))
    outcomes = cloze_ranks(words, split.ranks, split.engine, log, before)
    assert [outcome.code for outcome in outcomes] == [0 if stop is None else 75] * split.ranks, outcomes[0].output
    assert "all positions go through the head" not in outcomes[0].output


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(checkpoint: Path, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Return each parameter's name and its weight, or another tensor of its state."""
    manifest = read_manifest(checkpoint)
    with PieceReader(checkpoint, manifest) as pieces:
        for name, facts in manifest["parameters"].items():
            yield name, pieces.read(name, key).view(facts["shape"]).clone()
