"""What a command takes from a prepared folder is what was written: shards, tokenizer, and the ids that name tokens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cloze.cli.commands import compare, evaluate
from cloze.config import CompareConfig, EvaluateConfig, PrepareConfig, TrainConfig
from cloze.data.prepare.cache import open_or_prepare
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared import verified
from cloze.data.prepared.blocks import open_shard
from cloze.data.prepared.shards import manifest_checksum, open_prepared
from cloze.data.prepared.torch_dataset import PackedDataset
from cloze.data.prepared.verified import verify_for_use, verify_shards
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.written_tokenizer import read_written
from cloze.data.train_data import open_data
from cloze.errors import DataError
from cloze.utils import atomic_files

OPTIONS = TrainConfig(output_dir="unused")


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy of a prepared folder that may be changed."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def change(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def resign(folder: Path, **tokenizer: object) -> None:
    """Change what the manifest says of the tokenizer, with a checksum that fits."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"].update(tokenizer)
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


USES: dict[str, Callable[[str], object]] = {
    "train": lambda data: open_data(TrainConfig(dataset_name=data, output_dir="unused")),
    "evaluate": lambda data: evaluate.run(EvaluateConfig(model="unused", data=data, split="train")),
    "compare": lambda data: compare.run(CompareConfig(model="unused", other="unused", data=data, split="train")),
    "dataset": PackedDataset,
}


@pytest.mark.parametrize("wrong", [-1, 1 << 20])
def test_token_ids_outside_of_the_vocabulary_are_named_before_training(copied: Path, wrong: int):
    manifest = json.loads((copied / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    file = copied / "train" / shard["file"]
    ids = open_shard(file, shard["blocks"], manifest["block_size"])[0].ids
    place = file.read_bytes().index(ids[0].tobytes())
    content = bytearray(file.read_bytes())
    content[place : place + 4] = wrong.to_bytes(4, "little", signed=True)
    file.write_bytes(content)
    shard["sha256"] = atomic_files.sha256(file)
    manifest["checksum"] = manifest_checksum(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="outside of the vocabulary"):
        open_data(TrainConfig(dataset_name=str(copied), output_dir="unused"))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_shard_that_was_changed_in_place_is_named_before_it_is_used(copied: Path, use: Callable[[str], object]):
    shard = next((copied / "train").glob("*.arrow"))
    change(shard)
    with pytest.raises(DataError, match=f"{shard.name}: damaged: .*checksum"):
        use(str(copied))


def test_shards_are_read_once_until_something_writes_to_them(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CLOZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(verified, "ANNOUNCED_BYTES", 0)
    read = []
    plain = verified.sha256
    monkeypatch.setattr(verified, "sha256", lambda file: read.append(file) or plain(file))
    opened = open_prepared(copied)
    verify_shards(opened, ["train"])
    count = len(read)
    verify_shards(opened, ["train"])
    assert len(read) == 2 * count > 0  # small ones are read every time
    assert "shards to compare their checksums, once" in capsys.readouterr().out
    monkeypatch.setattr(verified, "PART_BYTES", 0)
    verify_shards(opened, ["train"])
    verify_shards(opened, ["train"])
    assert len(read) == 3 * count
    shard = next((copied / "train").glob("*.arrow"))
    times = shard.stat()
    change(shard)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=f"{shard.name}: damaged"):
        verify_shards(opened, ["train"])


def test_a_tokenizer_that_was_replaced_is_refused_wherever_it_is_loaded(copied: Path):
    file = copied / "tokenizer" / "tokenizer.json"
    facts = json.loads(file.read_text())
    vocabulary = facts["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(facts))
    for use in (lambda: load_tokenizer(str(copied / "tokenizer")), lambda: USES["train"](str(copied))):
        with pytest.raises(DataError, match="damaged: not the tokenizer"):
            use()


def test_a_lost_tokenizer_is_damage_and_no_name_on_the_hub(copied: Path):
    (copied / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"damaged: tokenizer.json is missing"):
        load_tokenizer(str(copied / "tokenizer"))
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(DataError, match="damaged: the tokenizer is missing"):
        load_tokenizer(str(copied / "tokenizer"))


def test_a_tokenizer_beside_a_manifest_of_another_program_is_part_of_no_prepared_folder(copied: Path):
    for content in ({"name": "app"}, {"tokenizer": "x", "splits": {}}, {"tokenizer": {"fingerprint": "x"}}):
        (copied / "manifest.json").write_text(json.dumps(content))
        assert read_written(str(copied / "tokenizer")) is None


def test_the_same_files_described_by_another_version_are_accepted(copied: Path):
    resign(copied, fingerprint="of another version")
    load_tokenizer(str(copied / "tokenizer"))
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["tokenizer_files"]  # folders of older versions list none, and have the same checksum
    assert manifest_checksum(manifest) == manifest["checksum"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not the tokenizer"):
        load_tokenizer(str(copied / "tokenizer"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"vocab_size": 50}, "damaged: vocab_size is not the one in manifest.json"),
        ({"mask_token_id": 7}, "damaged: mask_token_id is not the one in manifest.json"),
        ({"special_token_ids": [0, 90]}, "damaged: special_token_ids is not the one in manifest.json"),
        ({"special_token_ids": [0, 10**6]}, "damaged: token id 1000000 is outside of its vocabulary of"),
    ],
)
def test_a_manifest_that_does_not_fit_the_tokenizer_is_refused(copied: Path, facts: dict, message: str):
    resign(copied, **facts)
    with pytest.raises(DataError, match=message):
        verify_for_use(open_prepared(copied), ["train"], OPTIONS)


def test_blocks_that_lack_bad_records_are_not_taken_for_a_start_that_refuses_them(prepared: Path, tmp_path: Path):
    source = prepared.parent
    corpus = tmp_path / "bad.jsonl"
    corpus.write_bytes((source / "corpus.jsonl").read_bytes() + b"not JSON\n")
    values = {"dataset_name": str(corpus), "text_field": "answers.text", "block_size": 32}
    tokenizer, cache = str(source / "tokenizer"), tmp_path / "cache"
    skip = TrainConfig(**values, output_dir="unused", on_bad_record="skip")
    first = open_or_prepare(skip, tokenizer, cache)
    assert open_or_prepare(skip, tokenizer, cache).manifest == first.manifest
    with pytest.raises(DataError, match=r"1 bad records .*--on_bad_record skip"):
        open_or_prepare(TrainConfig(**values, output_dir="unused"), tokenizer, cache)
    with pytest.raises(DataError, match="1 bad records were left out"):
        prepare(PrepareConfig(**values, tokenizer_name=tokenizer, output=str(first.folder), num_proc=1))
