"""The same bytes for any number of processes, shards and machines, however often the work is killed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepare_units import UNIT, config, contents

from cloze.config import TokenizerConfig
from cloze.data.prepare import finalize, scheduler
from cloze.data.prepare import unit as units
from cloze.data.prepare.cache import open_or_prepare
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.errors import ConfigError, DataError


def test_any_number_of_processes_gives_the_same_bytes(corpus: Path, expected: tuple[str, dict], tmp_path: Path):
    packing, bytes_of_one = expected
    for num_proc in (2, 3):
        prepare(config(corpus, tmp_path / f"p{num_proc}", packing=packing, num_proc=num_proc))
        assert contents(tmp_path / f"p{num_proc}") == bytes_of_one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p2", "p3"]


@pytest.mark.parametrize(
    ("count", "order"),
    [(2, [1, 0]), (3, [0, 2, 1]), pytest.param(7, [3, 6, 0, 1, 5, 4, 2], marks=pytest.mark.slow)],
)
def test_any_number_of_shards_gives_the_same_bytes(
    corpus: Path, expected: tuple[str, dict], tmp_path: Path, count: int, order: list[int], capsys
):
    packing, bytes_of_one = expected
    for index in order[:-1]:
        more = {"packing": packing, "num_shards": count, "shard_index": index}
        assert prepare(config(corpus, tmp_path / "p", **more)) is None
    assert f"still to come from --shard_index {order[-1]}" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"are missing; run --shard_index {order[-1]} again"):
        prepare(config(corpus, tmp_path / "p", packing=packing, num_shards=count, finalize=True))
    last = {"packing": packing, "num_shards": count, "shard_index": order[-1]}
    assert prepare(config(corpus, tmp_path / "p", **last)) is not None
    assert contents(tmp_path / "p") == bytes_of_one
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_unit_that_was_lost_or_damaged_is_made_again(corpus: Path, expected: tuple[str, dict], tmp_path: Path):
    packing, bytes_of_one = expected
    more = {"packing": packing, "num_shards": 2}
    prepare(config(corpus, tmp_path / "p", shard_index=0, **more))
    units = sorted((tmp_path / "p.parts" / "units").iterdir())
    shutil.rmtree(units[0])
    (units[1] / "train.arrow").write_bytes(b"short")
    (units[2] / "unit.json").write_text("{")
    assert prepare(config(corpus, tmp_path / "p", shard_index=1, **more)) is None
    assert prepare(config(corpus, tmp_path / "p", shard_index=0, **more)) is not None
    assert contents(tmp_path / "p") == bytes_of_one


def test_less_than_one_block_is_lost_in_the_whole_corpus(corpus: Path, tokenizer: Path, tmp_path: Path):
    splits = prepare(config(corpus, tmp_path / "p"))["splits"]
    assert len(splits["train"]["shards"]) > 5
    for facts in splits.values():
        assert facts["tokens"] - facts["blocks"] * 32 == facts["dropped_tokens"] < 32
    assert sum(facts["documents"] for facts in splits.values()) == 600


@pytest.fixture(scope="module")
def done_and_begun(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two output folders, not to be changed: one with blocks, one with half of the units."""
    folder = tmp_path_factory.mktemp("outputs")
    prepare(config(corpus, folder / "done"))
    prepare(config(corpus, folder / "begun", num_shards=2, shard_index=0))
    return folder


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"block_size": 64}, "block_size 32 -> 64"),
        pytest.param({"text_field": "title"}, "source.text_field answers.text -> title", marks=pytest.mark.slow),
        ({"packing": "best_fit"}, "packing concat -> best_fit"),
        pytest.param({"unit_size": "50KB"}, "unit_size 40000 -> 50000", marks=pytest.mark.slow),
        pytest.param(
            {"validation_split_percentage": 5}, "split_rule.validation_percentage 10.0 -> 5.0", marks=pytest.mark.slow
        ),
        ({"split_special_tokens": True}, "split_special_tokens False -> True"),
        pytest.param({"split": "train[:100]"}, "source.split train -> train[:100]", marks=pytest.mark.slow),
        ({"tokenizer_name": "other"}, "tokenizer.fingerprint "),
        ({"dataset_name": "other"}, "source.files.a.jsonl.digest sha256:"),
    ],
)
def test_something_else_in_the_same_folder_is_refused(
    corpus: Path, done_and_begun: Path, tmp_path: Path, change: dict[str, Any], difference: str
):
    if change == {"tokenizer_name": "other"}:
        source = {"dataset_name": str(corpus / "all.jsonl"), "text_field": "title"}
        train_tokenizer(TokenizerConfig(**source, output=str(tmp_path / "other"), vocab_size=400))
        change = {"tokenizer_name": str(tmp_path / "other")}
    if change == {"dataset_name": "other"}:
        shutil.copytree(corpus / "data", tmp_path / "data")
        content = (tmp_path / "data" / "a.jsonl").read_bytes()
        (tmp_path / "data" / "a.jsonl").write_bytes(content.replace(b" is ", b" IS ", 1))
        change = {"dataset_name": str(tmp_path / "data")}
    before = contents(done_and_begun)
    for name, more in (("done", {}), ("begun", {"num_shards": 2, "shard_index": 1})):
        with pytest.raises(ConfigError) as caught:
            prepare(config(corpus, done_and_begun / name, **more | change))
        assert difference in str(caught.value)
        assert "choose another --output, or delete it" in str(caught.value)
    assert contents(done_and_begun) == before


def test_the_same_again_is_done_already(corpus: Path, expected: tuple[str, dict], tmp_path: Path, capsys):
    packing, _ = expected
    first = prepare(config(corpus, tmp_path / "p", packing=packing))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    assert prepare(config(corpus, tmp_path / "p", packing=packing, num_proc=3)) == first
    assert "done already; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")} == before


BAD_LINES = [
    (b'{"answers": {"text": null}}\n', "null text"),
    (b'{"answer": "x"}\n', "no field 'answers.text'"),
    (b'{"answers": {"text": 17}}\n', "field 'answers.text' is int, not text"),
    (b'{"answers": {"text": "caf\xe9"}}\n', "invalid UTF-8"),
    (b'{"answers": {"text": "half\n', "not JSON"),
    (b"[1, 2]\n", "not a JSON object"),
    (b'{"answers": {"text": "' + b"x" * (65 * 2**20) + b'"}}\n', "larger than 64 MiB"),
]


@pytest.fixture(scope="module")
def good(corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """The manifest of all threads in one file, none of them bad."""
    manifest = prepare(config(corpus, corpus / "good", dataset_name=str(corpus / "all.jsonl")))
    assert manifest is not None
    return manifest


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_record_is_refused_or_left_out(corpus: Path, good: dict, tmp_path: Path, line: bytes, reason: str):
    lines = (corpus / "all.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_bytes(b"".join([*lines[:300], line, *lines[300:]]))
    bad = {"dataset_name": str(tmp_path / "bad.jsonl"), "unit_size": UNIT if len(line) < 1000 else "10MB"}
    with pytest.raises(DataError, match=f"bad.jsonl, line 301: {reason}.*--on_bad_record skip"):
        prepare(config(corpus, tmp_path / "p", **bad))
    manifest = prepare(config(corpus, tmp_path / "p", **bad, on_bad_record="skip"))
    assert [key.startswith(reason) for key in manifest["bad_records"]] == [True]
    assert list(manifest["bad_records"].values()) == [1]
    assert manifest["bad_record_examples"][0].startswith(f"bad.jsonl, line 301: {reason}")
    for side in ("train", "validation"):
        assert manifest["splits"][side]["tokens"] == good["splits"][side]["tokens"]


def test_both_backends_give_the_same_shards(corpus: Path, tokenizer: Path, tmp_path: Path):
    pytest.importorskip("gigatoken")
    for special in (False, True):
        shards = []
        for backend in ("gigatoken", "tokenizers"):
            output = tmp_path / f"{backend}-{special}"
            more = {"tokenizer_backend": backend, "split_special_tokens": special}
            manifest = prepare(config(corpus, output, **more))
            assert manifest["tokenizer"]["backend"].startswith(backend)
            shards.append(manifest["splits"])
        assert shards[0] == shards[1]
    assert open_prepared(tmp_path / "gigatoken-True").manifest["split_special_tokens"] is True


def test_a_fork_of_a_process_that_has_prepared_prepares_too(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus, tmp_path / "first", num_proc=2))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if prepare(config(corpus, tmp_path / "second", num_proc=2)) == first else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.usefixtures("chosen_before")
def test_tasks_that_end_together_all_find_the_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other task makes the folder, and removes the parts, while this one is finalizing, at any of its steps."""
    steps = ("read_unit", "_join", "publish")
    for name in steps:
        given: list[Any] = []
        plain, plain_step = finalize.finalize, getattr(finalize, name)

        def note(*args: Any, given: list[Any] = given, plain: Any = plain) -> Any:
            given[:] = args
            return plain(*args)

        def interrupt(*args: Any, given: list[Any] = given, name: str = name, step: Any = plain_step) -> Any:
            if given:
                monkeypatch.setattr(finalize, name, step)
                others, given[:] = list(given), []
                finalize.finalize(*others)
            return step(*args)

        monkeypatch.setattr("cloze.data.prepare.finalize", note)
        monkeypatch.setattr(finalize, name, interrupt)
        output = tmp_path / name
        assert prepare(config(corpus, output, unit_size="400KB")) is not None
        assert given == [], "the other task was not in time"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(steps[: steps.index(name) + 1])


@pytest.mark.usefixtures("chosen_before")
def test_a_unit_that_a_listing_hides_is_named_or_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config(corpus, tmp_path / "expected"))
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))
    prepare(config(corpus, tmp_path / "p"))
    assert contents(tmp_path / "p") == contents(tmp_path / "expected")
    hidden = "000001-000000"
    monkeypatch.setattr(finalize, "read_unit", lambda unit: None if unit.name == hidden else units.read_unit(unit))
    with pytest.raises(DataError, match=r"unit 000001-000000 is missing"):
        prepare(config(corpus, tmp_path / "q"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_file_locks_each_machine_makes_the_cache(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, capsys
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    settings = config(corpus, tmp_path / "unused", unit_size="400KB")
    here: list[Any] = []
    plain = scheduler.do_units

    def together(*args: Any) -> None:
        """The other machine finishes, and removes the parts, while this one is at work."""
        if not here:
            here.append(True)
            here.append(open_or_prepare(settings, str(tokenizer), tmp_path / "cache"))
        plain(*args)

    monkeypatch.setattr("cloze.data.prepare.pipeline.do_units", together)
    mine = open_or_prepare(settings, str(tokenizer), tmp_path / "cache")
    assert mine.manifest == here[1].manifest
    assert "its file system has no locks" in capsys.readouterr().err
