"""`cloze bench prepare`: from a corpus to blocks, beside the tutorial's way and the tokenizers alone.

All methods run once, one after another, on the same records; a note says so. Times exclude start-up (imports, the
choice of a backend) and include the start of a method's own processes. All rates use the same token count, so that
they can be compared.
"""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet

from cloze.config import BenchConfig, PrepareConfig, TokenizerConfig
from cloze.data.corpus.fields import Fields
from cloze.data.corpus.formats import Piece
from cloze.data.corpus.jsonl import parse_line
from cloze.data.corpus.readers import read_piece
from cloze.data.corpus.sources import open_corpus
from cloze.data.prepare.pipeline import make_recipe, open_inputs, prepare, usable_cores
from cloze.data.prepare.scheduler import WorkerShard, do_units
from cloze.data.prepared.packing import Concat
from cloze.data.prepared.shards import ShardWriter
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.data.tokenizers.encoders import Encoder, EncoderSpec, batches
from cloze.data.tokenizers.load import load_tokenizer
from cloze.tools.bench.folder import work_folder
from cloze.tools.bench.table import Table
from cloze.tools.demo.corpus import write_corpus
from cloze.utils.atomic_files import remove_tree
from cloze.utils.terminal.console import say

TEXT_FIELD = "answers.text"
SAMPLE_THREADS = 4000
ROW_GROUP = 1000


def bench_prepare(config: BenchConfig) -> Table:
    """Run it all and return the table."""
    num_proc = config.num_proc or usable_cores()
    with work_folder(config.work_dir) as folder:
        files, texts = make_corpus(config, folder)
        tokenizer = load_tokenizer(config.tokenizer_name or _sample_tokenizer(folder))
        name = config.tokenizer_name or str(folder / "tokenizer")
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        table = Table(
            f"{len(texts):,} threads, {megabytes:,.0f} MB of text, {num_proc} processes",
            ["what", "seconds", "MB of text/s", "Mtok/s", "x tutorial"],
        )
        inputs = open_inputs(_settings(config, files[".jsonl"], name, folder), name)
        recipe = make_recipe(_settings(config, files[".jsonl"], name, folder), inputs, "auto")
        found: dict[str, float] = {}
        tokens = 0
        for suffix, file in files.items():
            settings = _settings(config, file, name, folder / f"out{suffix}")
            manifest = prepare(settings)
            assert manifest is not None
            tokens = sum(facts["tokens"] for facts in manifest["splits"].values())
            found[f"cloze prepare, {suffix}"] = _time_units(settings, name, folder, num_proc)
        backend = recipe.encoder.backend
        if backend == "gigatoken":
            found["gigatoken alone, in memory"] = _time(lambda: _gigatoken_alone(recipe.encoder, texts))
        found["tokenizers alone, in memory"] = _time(lambda: _tokenizers_alone(tokenizer, texts))
        say("bench", "the tutorial's map and group_texts; this takes long")
        tutorial = _tutorial_seconds(files[".jsonl"], name, config.block_size, num_proc, folder)
        found["tutorial: map + group_texts, .jsonl"] = tutorial
        for what, seconds in found.items():
            table.add(what, seconds, megabytes / seconds, tokens / seconds / 1e6, tutorial / seconds)
        for what, seconds in stages(files[".jsonl"], recipe.encoder, config.block_size, folder).items():
            table.add(f"  one process: {what}", seconds, megabytes / seconds, tokens / seconds / 1e6, None)
        table.notes.append("each row is a single run: on a busy machine, the figures are uncertain")
        return table


def make_corpus(config: BenchConfig, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the same records as .jsonl, .parquet and .jsonl.gz, and their texts. Answers are shuffled between the
    threads in every repetition, so that no two documents are the same for a cache."""
    source = Path(config.dataset_name) if config.dataset_name else folder / "sample.jsonl"
    if config.dataset_name is None:
        write_corpus(source, num_threads=SAMPLE_THREADS)
    from cloze.data.corpus.sources import items_of  # records, not documents: their other fields are part of the work

    corpus = open_corpus(PrepareConfig(dataset_name=str(source), text_field=TEXT_FIELD, tokenizer_name="", output=""))
    records = [
        parse_line(raw) if isinstance(raw, bytes) else raw
        for task in corpus.tasks
        for _, raw in items_of(task, corpus.fields)
    ]
    answers = [answer for record in records for answer in record["answers"]["text"]]  # type: ignore[index, call-overload]
    rng, numbers = random.Random(0), count()
    files = {suffix: folder / f"corpus{suffix}" for suffix in (".jsonl", ".parquet", ".jsonl.gz")}
    texts: list[str] = []
    writer: Any = None
    with open(files[".jsonl"], "wb") as lines, gzip.open(files[".jsonl.gz"], "wb", 6) as packed:
        while lines.tell() < config.megabytes * 1_000_000:
            rows = _shuffled(records, answers, rng, numbers)
            texts += [" ".join(row["answers"]["text"]) for row in rows]
            block = b"".join(orjson.dumps(row) + b"\n" for row in rows)
            lines.write(block)
            packed.write(block)
            arrow = pyarrow.Table.from_pylist(rows)
            writer = writer or pyarrow.parquet.ParquetWriter(files[".parquet"], arrow.schema)
            writer.write_table(arrow.cast(writer.schema), row_group_size=ROW_GROUP)
        writer.close()
    return files, texts


def _shuffled(records: list[Any], answers: list[str], rng: random.Random, numbers: Iterator[int]) -> list[Any]:
    rng.shuffle(answers)
    taken = iter(answers)
    return [
        record
        | {
            "q_id": f"q{next(numbers)}",
            "answers": record["answers"] | {"text": [next(taken) for _ in record["answers"]["text"]]},
        }
        for record in records
    ]


def _sample_tokenizer(folder: Path) -> str:
    output = str(folder / "tokenizer")
    source = str(folder / "sample.jsonl")
    train_tokenizer(TokenizerConfig(dataset_name=source, text_field=TEXT_FIELD, output=output, vocab_size=8192))
    return output


def _settings(config: BenchConfig, file: Path, tokenizer: str, output: Path) -> PrepareConfig:
    return PrepareConfig(
        dataset_name=str(file),
        text_field=TEXT_FIELD,
        tokenizer_name=tokenizer,
        output=str(output),
        block_size=config.block_size,
        num_proc=config.num_proc,
    )


def _time(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _time_units(settings: PrepareConfig, tokenizer: str, folder: Path, num_proc: int) -> float:
    """Time the way from files to finished, fsynced units: without the start and the final renames."""
    inputs = open_inputs(settings, tokenizer)
    recipe = make_recipe(settings, inputs, "auto")
    units = folder / "units"
    try:
        return _time(
            lambda: do_units(recipe, inputs.corpus.tasks, units, num_proc, WorkerShard(), inputs.facts["unit_size"])
        )
    finally:
        remove_tree(units, quietly=True)


def _gigatoken_alone(spec: EncoderSpec, texts: list[str]) -> None:
    import gigatoken

    gigatoken.Tokenizer.from_json(spec.tokenizer).encode_batch(texts, parallel=True)


def _tokenizers_alone(tokenizer: Any, texts: list[str]) -> None:
    """Encode with `tokenizers` alone, on all cores by its own threads, in batches: all at once would need many
    gigabytes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    for batch in batches(texts):
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            len(encoding.ids)  # made on demand
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


TUTORIAL = """
import sys, time
from datasets import load_dataset
from transformers import AutoTokenizer

file, name, block_size, num_proc, cache = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
tokenizer = AutoTokenizer.from_pretrained(name)
begin = time.perf_counter()
eli5 = load_dataset("json", data_files=file, split="train", cache_dir=cache).flatten()

def preprocess(examples):
    return tokenizer([" ".join(x) for x in examples["answers.text"]])

def group(examples):
    joined = {key: sum(examples[key], []) for key in examples}
    total = len(joined[list(examples)[0]]) // block_size * block_size
    result = {k: [t[i : i + block_size] for i in range(0, total, block_size)] for k, t in joined.items()}
    result["labels"] = result["input_ids"].copy()
    return result

tokenized = eli5.map(preprocess, batched=True, num_proc=num_proc, remove_columns=eli5.column_names)
blocks = tokenized.map(group, batched=True, num_proc=num_proc)
print("SECONDS", time.perf_counter() - begin)
"""


def _tutorial_seconds(file: Path, tokenizer: str, block_size: int, num_proc: int, folder: Path) -> float:
    """Return the Hugging Face tutorial's two maps, in a process of its own."""
    words = [sys.executable, "-c", TUTORIAL, str(file), tokenizer, str(block_size), str(num_proc), str(folder / "hf")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("SECONDS")))


def stages(file: Path, spec: EncoderSpec, block_size: int, folder: Path) -> dict[str, float]:
    """Return the time of each stage in one process over the whole corpus, one stage after another."""
    fields = Fields.parse(TEXT_FIELD, None)
    piece = Piece(str(file), 0, None, 0)
    begin = time.perf_counter()
    lines = [raw for _, raw in read_piece(piece, fields)]
    read = time.perf_counter()
    texts = [fields.document(parse_line(line)).text for line in lines if isinstance(line, bytes)]
    parsed = time.perf_counter()
    encode = Encoder(spec)
    loaded = time.perf_counter()
    encoded = [encode(batch) for batch in batches(texts, 4 * 2**20)]
    tokenized = time.perf_counter()
    packer = Concat(block_size)
    packed = [packer.add(tokens, lengths) for tokens, lengths in encoded]
    grouped = time.perf_counter()
    writer = ShardWriter(folder / "stage.arrow", block_size)
    for blocks in packed:
        writer.add(blocks)
    writer.close()
    written = time.perf_counter()
    return {
        "read": read - begin,
        "parse": parsed - read,
        "tokenize": tokenized - loaded,
        "pack": grouped - tokenized,
        "write and hash": written - grouped,
    }
