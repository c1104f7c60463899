"""`cloze prepare` and `cloze tokenizer`: the tutorial's blocks, reproducible, whole or not there."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cloze.cli import main
from cloze.data.prepare.unit import is_validation
from cloze.data.prepared.shards import open_prepared

WORDS = ["the", "a", "Milky", "Way", "is", "galaxy", "spiral", "water", "boils", "at", "hundred", "naïve", "🌌"]


def records(count: int = 200) -> list[dict]:
    rng = random.Random(0)
    texts = [
        [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(rng.randint(1, 3))] for _ in range(count)
    ]
    return [{"q_id": f"q{i}", "answers": {"text": text}} for i, text in enumerate(texts)]


def write_corpus(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def cloze(*argv: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in argv])
    return int(leaving.value.code or 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", records())


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Path:
    output = corpus.parent / "tokenizer"
    source = ["--dataset_name", corpus, "--text_field", "answers.text"]
    assert cloze("tokenizer", *source, "--vocab_size", "300", "--output", output) == 0
    return output


def flags(corpus: Path, tokenizer: Path, output: Path, *more: object) -> list[object]:
    source = ["prepare", "--dataset_name", corpus, "--text_field", "answers.text", "--tokenizer_name", tokenizer]
    return [*source, "--block_size", "16", "--output", output, *more]


def test_blocks_are_the_tutorials_without_its_dropped_tails(corpus: Path, tokenizer: Path, tmp_path: Path):
    assert cloze(*flags(corpus, tokenizer, tmp_path / "p", "--validation_split_percentage", 0)) == 0
    encode = AutoTokenizer.from_pretrained(tokenizer)
    stream = [i for row in records() for i in encode(" ".join(row["answers"]["text"]))["input_ids"]]
    expected = [stream[i : i + 16] for i in range(0, len(stream) // 16 * 16, 16)]
    assert datasets.load_from_disk(str(tmp_path / "p"))["train"]["input_ids"][:] == expected
    facts = open_prepared(tmp_path / "p").manifest["splits"]["train"]
    assert facts["documents"] == 200
    assert facts["tokens"] == len(stream) == facts["blocks"] * 16 + facts["dropped_tokens"]


def test_the_same_corpus_gives_the_same_bytes(corpus: Path, tokenizer: Path, tmp_path: Path):
    for name in ("one", "two"):
        assert cloze(*flags(corpus, tokenizer, tmp_path / name)) == 0
    one, two = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one == two


def test_no_path_of_this_machine_gets_into_the_folder(corpus: Path, tokenizer: Path, tmp_path: Path):
    assert cloze(*flags(corpus, tokenizer, tmp_path / "p")) == 0
    for path in (tmp_path / "p").rglob("*"):
        if path.is_file():
            assert str(corpus.parent).encode() not in path.read_bytes(), path


def test_a_document_falls_on_the_same_side_in_any_order(tokenizer: Path, tmp_path: Path):
    rows = records()
    sides = []
    for name in ("one", "two"):
        corpus = write_corpus(tmp_path / f"{name}.jsonl", rows)
        assert cloze(*flags(corpus, tokenizer, tmp_path / name, "--validation_split_percentage", 20)) == 0
        sides.append(open_prepared(tmp_path / name).manifest["splits"]["validation"]["tokens"])
        random.Random(1).shuffle(rows)
    assert sides[0] == sides[1]
    share = sum(is_validation(f"id-{i}", 20) for i in range(20_000)) / 20_000
    assert abs(share - 0.2) < 0.015
    assert not any(is_validation(f"id-{i}", 0) for i in range(1000))


def test_validation_may_be_a_split_of_its_own(tokenizer: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    write_corpus(tmp_path / "data" / "train.jsonl", records()[:150])
    write_corpus(tmp_path / "data" / "validation.jsonl", records()[150:])
    assert cloze(*flags(tmp_path / "data", tokenizer, tmp_path / "p", "--validation_split", "validation[:30]")) == 0
    splits = open_prepared(tmp_path / "p").manifest["splits"]
    assert (splits["train"]["documents"], splits["validation"]["documents"]) == (150, 30)


def test_a_validation_split_that_is_not_used_is_named(tokenizer: Path, tmp_path: Path, capfd):
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        write_corpus(tmp_path / "data" / f"{name}.jsonl", records())
    unused = "the split validation is not used: validation documents are taken from train; --validation_split"
    assert cloze(*flags(tmp_path / "data", tokenizer, tmp_path / "p")) == 0
    assert unused in capfd.readouterr().err
    assert cloze(*flags(tmp_path / "data", tokenizer, tmp_path / "q", "--validation_split_percentage", 0)) == 0
    assert cloze(*flags(tmp_path / "data", tokenizer, tmp_path / "r", "--validation_split", "validation")) == 0
    assert "is not used" not in (told := capfd.readouterr().err)
    assert "100.0 % of the validation documents are training documents, too" in told


def test_ids_that_are_mostly_the_same_are_named(tokenizer: Path, tmp_path: Path, capfd):
    rows = [row | {"q_id": number % 3} for number, row in enumerate(records(600))]
    corpus = write_corpus(tmp_path / "c.jsonl", rows)
    assert cloze(*flags(corpus, tokenizer, tmp_path / "p")) == 0
    assert "0 of 600 documents are validation documents, not 5 %: many have the same id" in capfd.readouterr().err


def test_the_tokenizer_is_roberta_to_everyone(tokenizer: Path, corpus: Path, tmp_path: Path):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert len(loaded) == 300
    assert loaded.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 4]
    ids = loaded("The Milky Way is a <mask> galaxy.")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert loaded.convert_ids_to_tokens(ids)[ids.index(4) + 1].startswith("Ġ")
    assert loaded.convert_ids_to_tokens(ids)[ids.index(4) - 1] != "Ġ"  # the mask stands for a word and its space
    for text in ("Milky Way", "naïve 🌌 \t 日本語", "<odd> text"):
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    source = ["--dataset_name", corpus, "--text_field", "answers.text", "--vocab_size", "300"]
    assert cloze("tokenizer", *source, "--output", tmp_path / "again") == 0
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def no_mask(folder: Path) -> Path:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a b c"], vocab_size=300, special_tokens=["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def cut_gz(folder: Path) -> Path:
    folder.mkdir(parents=True)
    content = "".join(json.dumps(row) + "\n" for row in records()).encode()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(content)[:-30])
    return folder / "cut.jsonl.gz"


def make(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    return write_corpus(folder / "corpus.jsonl", rows)


BAD: list[tuple[str, Callable[[Path], list[object]], str]] = [
    ("missing file", lambda d: ["--dataset_name", d / "nowhere.jsonl"], "no such file or folder"),
    ("cut gz", lambda d: ["--dataset_name", cut_gz(d)], "cut.jsonl.gz: cannot be unpacked"),
    ("missing field", lambda d: ["--text_field", "answer"], "no field 'answer'; the fields are: q_id, answers.text"),
    (
        "empty documents",
        lambda d: ["--dataset_name", make(d, [{"answers": {"text": [" ", ""]}}] * 3)],
        "all 3 documents are empty",
    ),
    ("no documents", lambda d: ["--dataset_name", make(d, [])], "no documents"),
    ("small corpus", lambda d: ["--block_size", "100000"], "less than a block of 100000"),
    (
        "no mask token",
        lambda d: ["--tokenizer_name", no_mask(d)],
        "has no mask token; take the tokenizer of an encoder",
    ),
    ("no tokenizer", lambda d: ["--tokenizer_name", d / "nowhere"], "cannot load the tokenizer"),
    ("block size", lambda d: ["--block_size", "0"], "--block_size: must be at least 8"),
    ("percentage", lambda d: ["--validation_split_percentage", "100"], "must be at least 0 and below 100"),
    ("unknown split", lambda d: ["--split", "test"], "no split 'test'; the splits are: train"),
    (
        "no validation split",
        lambda d: ["--validation_split", "dev"],
        "no split 'dev'; the splits are: train; choose one with --validation_split",
    ),
    ("no field", lambda d: ["--text_field", " , "], "--text_field: names no field"),
    ("a field twice", lambda d: ["--text_field", "q_id, q_id"], "--text_field: names 'q_id' twice"),
    (
        "one id",
        lambda d: [
            "--dataset_name",
            make(d, [row | {"q_id": "e"} for row in records(200)]),
            "--validation_split_percentage",
            20,
        ],
        "many have the same id, or text; give the --id_field of another field",
    ),
]


@pytest.mark.parametrize(("make_flags", "expected"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tokenizer, tmp_path, capfd, make_flags, expected):
    (tmp_path / "out").mkdir()
    more = make_flags(tmp_path / "bad")
    assert cloze(*flags(corpus, tokenizer, tmp_path / "out" / "p", *more)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cloze: error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_line_in_the_middle_is_named(corpus: Path, tokenizer: Path, tmp_path: Path, capfd):
    lines = corpus.read_text().splitlines()
    lines[120] = lines[120][:-5]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    assert cloze(*flags(tmp_path / "bad.jsonl", tokenizer, tmp_path / "p")) == 2
    assert "bad.jsonl, line 121: not JSON" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_an_output_folder_in_use_is_left_alone(corpus: Path, tokenizer: Path, tmp_path: Path, capfd):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine").write_text("precious")
    assert cloze(*flags(corpus, tokenizer, tmp_path / "p")) == 2
    assert "exists already (not a prepared folder); choose another --output\n" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["mine"]
    source = ["--dataset_name", corpus, "--text_field", "answers.text"]
    assert cloze("tokenizer", *source, "--output", tmp_path / "p") == 2
    assert cloze("tokenizer", *source, "--output", tmp_path / "t", "--vocab_size", "100") == 2
    assert "--vocab_size: must be at least 261" in capfd.readouterr().err


def test_a_full_disk_leaves_nothing(corpus: Path, tokenizer: Path, tmp_path: Path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        assert cloze(*flags(corpus, tokenizer, disk / "p")) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cloze: error: ")]
        assert len(errors) == 1
        assert "No space left on device" in errors[0]
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
