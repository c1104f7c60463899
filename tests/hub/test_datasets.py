"""Datasets of the Hub are streamed: the real client over HTTP, from a server on this machine."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from dataset_hub import DatasetHub

from cloze.data.prepared.shards import open_prepared

TOKEN = "hf_read"


@pytest.fixture
def hub() -> Iterator[DatasetHub]:
    with DatasetHub((TOKEN,)) as running:
        yield running


@pytest.fixture(scope="module")
def rows(prepared: Path) -> list[dict]:
    return [json.loads(line) for line in (prepared.parent / "corpus.jsonl").read_text().splitlines()]


def parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=20)
    return sink.getvalue()


def command(hub: DatasetHub, prepared: Path, output: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    words = [sys.executable, "-m", "cloze", "prepare", "--tokenizer_name", str(prepared.parent / "tokenizer")]
    words += ["--output", str(output), "--block_size", "32", "--num_proc", "1", "--tokenizer_backend", "tokenizers"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(output.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    return [*words, *more], env


def run(hub: DatasetHub, prepared: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words, env = command(hub, prepared, output, *more)
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)


def prepare_ok(hub: DatasetHub, prepared: Path, output: Path, *more: str) -> dict:
    done = run(hub, prepared, output, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return open_prepared(output).manifest


def tokens_of(folder: Path, split: str = "train") -> list[int]:
    blocks = open_prepared(folder).blocks(split)
    return blocks.read(np.arange(len(blocks))).reshape(-1).tolist()


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("cloze: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_a_dataset_of_the_hub_gives_the_blocks_of_the_same_files_here(hub, rows, prepared: Path, tmp_path: Path):
    files = {"data/train-0.parquet": parquet(rows[:150]), "data/validation-0.parquet": parquet(rows[150:])}
    hub.add("owner/eli5", files)
    hub.add("owner/lines", {"train.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows[:150])).encode())})
    for name, content in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(content)
    source = ["--text_field", "answers.text", "--validation_split_percentage", "0"]
    both = [*source, "--validation_split", "validation"]
    far = prepare_ok(hub, prepared, tmp_path / "far", "--dataset_name", "owner/eli5", *both)
    near = prepare_ok(hub, prepared, tmp_path / "near", "--dataset_name", str(tmp_path / "here"), *both)
    assert far["splits"] == near["splits"]
    assert far["splits"]["validation"]["documents"] == len(rows) - 150
    assert far["source"]["revision"] == hub.commit("owner/eli5", "main")
    lines = prepare_ok(hub, prepared, tmp_path / "lines", "--dataset_name", "owner/lines", *source)
    assert lines["splits"]["train"] == far["splits"]["train"]
    first = prepare_ok(hub, prepared, tmp_path / "5", "--dataset_name", "owner/lines", *source, "--split", "train[:5]")
    assert first["splits"]["train"]["documents"] == 5
    assert tokens_of(tmp_path / "5") == tokens_of(tmp_path / "far")[: len(tokens_of(tmp_path / "5"))]


def test_a_preset_knows_where_its_corpus_lives(hub, rows, prepared: Path, tmp_path: Path):
    kilt = [
        {"id": row["q_id"], "input": row["title"], "output": [{"answer": text} for text in row["answers"]["text"]]}
        for row in rows
    ]
    card = b"---\nconfigs:\n- config_name: eli5\n  data_files:\n  - split: train\n    path: eli5/train*\n---\n"
    hub.add("facebook/kilt_tasks", {"eli5/train-0.parquet": parquet(kilt), "README.md": card})
    hub.add("dany0407/eli5_category", {"x.py": b"raise SystemExit('never run')"})
    converted = {"default/train/0000.parquet": parquet(rows)}
    hub.add("dany0407/eli5_category", converted, branch="refs/convert/parquet")
    flags = ["--validation_split_percentage", "0", "--unit_size", "1GB"]
    one = prepare_ok(hub, prepared, tmp_path / "kilt", "--preset", "eli5_kilt", *flags)
    two = prepare_ok(hub, prepared, tmp_path / "category", "--preset", "eli5_category", *flags)
    assert one["source"]["dataset_name"] == "facebook/kilt_tasks"
    assert two["source"]["revision"] == hub.commit("dany0407/eli5_category", "refs/convert/parquet")
    assert one["splits"] == two["splits"]
    assert one["splits"]["train"]["documents"] == len(rows)


@pytest.mark.slow
def test_killed_and_started_again_the_bytes_are_the_same(hub, rows, prepared: Path, tmp_path: Path):
    hub.add("owner/eli5", {f"train-{n}.parquet": parquet(rows[n * 60 : n * 60 + 60]) for n in range(5)})
    flags = ["--dataset_name", "owner/eli5", "--text_field", "answers.text", "--unit_size", "4KB"]
    expected = prepare_ok(hub, prepared, tmp_path / "whole", *flags)
    words, env = command(hub, prepared, tmp_path / "killed", *flags)
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed.parts" / "units").glob("00000[1-3]-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed").exists()
    again = prepare_ok(hub, prepared, tmp_path / "killed", *flags)
    assert again["checksum"] == expected["checksum"]
    assert len(again["splits"]["train"]["shards"]) > 5


def test_a_private_dataset_needs_a_token_which_is_kept_nowhere(hub, rows, prepared: Path, tmp_path: Path):
    hub.add("owner/secret", {"train.parquet": parquet(rows)}, private=True)
    flags = ["--dataset_name", "owner/secret", "--text_field", "answers.text"]
    assert "owner/secret: cannot load the dataset" in refusal(run(hub, prepared, tmp_path / "p", *flags))
    assert not list(tmp_path.glob("p*"))
    done = run(hub, prepared, tmp_path / "p", *flags, "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    for path in (tmp_path / "p").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--dataset_name", "owner/nowhere"], "owner/nowhere: cannot load the dataset"),
        (["--dataset_name", "owner/eli5", "--split", "test"], "no split 'test'; the splits are: train"),
        (["--dataset_name", "owner/eli5", "--text_field", "body"], "no field 'body'; the fields are: "),
        (["--dataset_name", "owner/eli5", "--dataset_revision", "v9"], "owner/eli5: cannot load the dataset"),
        (["--dataset_name", "owner/script"], "try --dataset_revision refs/convert/parquet"),
        (["--dataset_name", "owner/broken"], "owner/broken"),
    ],
)
def test_bad_input_is_one_line(hub, rows, prepared: Path, tmp_path: Path, flags: list[str], expected: str):
    hub.add("owner/eli5", {"train.parquet": parquet(rows)})
    hub.add("owner/script", {"script.py": b"raise SystemExit('never run')"})
    hub.add("owner/broken", {"train.parquet": parquet(rows)[:-200]})
    line = refusal(run(hub, prepared, tmp_path / "p", *["--text_field", "answers.text", *flags]))
    assert expected in line
    assert not list(tmp_path.glob("p*"))
