"""Made-up proteins and the tokenizer of ESM-2, for tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from cloze.config import PrepareConfig
from cloze.data.prepare.pipeline import prepare

# The vocabulary of ESM-2 (facebook/esm2_*), in its order.
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
ESM = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<null_1>", "<mask>"]
FAMILIES = ["MKTAYIQRFV", "GLSPHWDENC"]
TINY_ESM = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"


def sequences(count: int) -> list[str]:
    """Proteins of two families of ten amino acids each: the letters around tell which ones may be masked."""
    draw = random.Random(0)
    return ["".join(draw.choices(draw.choice(FAMILIES), k=draw.randint(40, 120))) for _ in range(count)]


def write_esm(folder: Path, vocabulary: Sequence[str] = ESM) -> Path:
    """A tokenizer folder as ESM-2's are."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EsmTokenizer"}))
    return folder


def prepare_proteins(corpus: Path, tokenizer: Path, output: Path, **more) -> Path:
    """Blocks of 32 of a text file with a sequence on each line."""
    names = {"dataset_name": str(corpus), "tokenizer_name": str(tokenizer), "output": str(output)}
    prepare(PrepareConfig(**names, block_size=32, num_proc=1, **more))
    return output


def train_esm(data: Path, output: Path) -> list[str]:
    """The command that trains a tiny ESM until it knows the families."""
    flags = ["--model_type", "esm", "--config_overrides", TINY_ESM, "--max_steps", "40", "--learning_rate", "1e-2"]
    flags += ["--per_device_train_batch_size", "16", "--logging_steps", "10", "--save_steps", "40"]
    return ["train", "--dataset_name", str(data), "--output_dir", str(output), *flags]
