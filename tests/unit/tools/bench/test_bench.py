"""`cloze bench` runs every peer and prints what it measured; how fast anything is, is not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import cloze
from cloze.cli import main
from cloze.config import BenchConfig
from cloze.data.prepared.verified import verify_prepared
from cloze.data.tokenizers.load import load_tokenizer
from cloze.tools.bench import train
from cloze.tools.bench.interleave import OutOfMemory, PeerFailed, Turn, best_batch
from cloze.tools.bench.sizes import SIZES, make_data, shares_of
from cloze.tools.bench.table import Table


def bench(*argv: object) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *(str(word) for word in argv)])
    assert not leaving.value.code


def test_prepare_is_measured_beside_the_tutorial_and_the_tokenizers(tmp_path: Path, capsys):
    output = tmp_path / "bench.json"
    bench("prepare", "--megabytes", 1, "--num_proc", 2, "--work_dir", tmp_path / "work", "--output", output)
    found = json.loads(output.read_text())
    rates = {row[0].strip(): row[1:] for row in found["rows"]}
    for name in (
        "cloze prepare, .jsonl",
        "cloze prepare, .parquet",
        "cloze prepare, .jsonl.gz",
        "tokenizers alone, in memory",
        "tutorial: map + group_texts, .jsonl",
        "one process: read",
        "one process: parse",
        "one process: tokenize",
        "one process: pack",
        "one process: write and hash",
    ):
        seconds, megabytes, tokens, _ = rates[name]
        assert seconds > 0
        assert megabytes > 0
        assert tokens > 0
    assert rates["tutorial: map + group_texts, .jsonl"][-1] == 1.0
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["packages"]["datasets"]
    printed = capsys.readouterr().out
    assert "cloze prepare, .parquet" in printed
    assert "each row is a single run" in printed
    assert list((tmp_path / "work").iterdir()) == []


def test_the_loader_is_measured_on_a_folder_of_its_own(tmp_path: Path):
    output = tmp_path / "bench.json"
    bench("loader", "--num_blocks", 70_000, "--block_size", 16, "--work_dir", tmp_path / "work", "--output", output)
    found = json.loads(output.read_text())
    assert found["title"] == "70,000 blocks of 16"
    figures = {row[0]: row[1] for row in found["rows"]}
    assert figures["opening the folder"] > 0
    assert figures["blocks read meanwhile"] > 0
    assert figures["first batch of a run that resumes at step 1,000,000"] > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_saving_is_measured_beside_torch_save(tmp_path: Path):
    output = tmp_path / "bench.json"
    size = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=600"
    bench("save", "--config_overrides", size, "--work_dir", tmp_path / "work", "--output", output)
    rows = {row[0]: row[1:] for row in json.loads(output.read_text())["rows"]}
    for name in ("torch.save, flushed", "cloze, blocking", "cloze, --async_save, after that"):
        waits, whole, _ = rows[name]
        assert 0 < waits <= whole
    assert rows["load it, compare checksums"][0] > 0
    assert list((tmp_path / "work").iterdir()) == []


# What no machine needs that only measures training: whoever imports it is told that it is not there.
ABSENT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in ("datasets", "deepspeed", "evaluate", "gigatoken")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""
# The CPU with the search for batches of `--gpu`, cut short.
SEARCHING = """
import sys
from functools import partial
from cloze.tools.bench import interleave, train
from cloze.cli import main

train.compare = partial(train.compare, search=True)
interleave.LARGEST_BATCH, interleave.SEARCH_STEPS = 16, 1
train.best_batch = partial(interleave.best_batch, first_tokens=8 * 32)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_training_is_measured_beside_trainer_and_a_bare_loop_with_little_installed(tmp_path: Path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "sitecustomize.py").write_text(ABSENT)
    paths = [str(tmp_path / "absent"), str(Path(cloze.__file__).parent.parent)]
    output, work = tmp_path / "bench.json", tmp_path / "work"
    words = ["--sizes", "tiny-32", "--rounds", "2", "--work_dir", work, "--output", output]
    done = subprocess.run(
        [sys.executable, "-c", SEARCHING, "bench", "train", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["command"].endswith(" ".join(map(str, words)))
    assert found["machine"]["packages"]["torch"] == torch.__version__
    rows = {row[0]: row[1:] for row in found["rows"]}
    assert list(rows) == [
        "tiny-32: cloze train",
        "tiny-32: bare PyTorch loop, sparse head",
        "tiny-32: transformers Trainer",
        "tiny-32: time per token, Trainer / cloze train",
        "tiny-32: CPU time per token, Trainer / cloze train",
        "tiny-32: time per step, cloze train / bare loop",
        "tiny-32: CPU time per step, cloze train / bare loop",
    ]
    for _blocks, tokens, masked, step, low, high, cpu, _mfu, peak, recompiled in list(rows.values())[:3]:
        assert 0.1 * tokens < masked < 0.15 * tokens
        assert step > 0
        assert cpu > 0
        assert (low, high) == (None, None)
        assert peak > 0
        assert recompiled == 0
    assert len(found["notes"]) == len(rows)
    assert all(note.endswith("too few for an interval, which needs 6") for note in found["notes"])
    one = found["sizes"]["tiny-32"]
    assert one["failed"] == {}
    for peer in ("cloze", "bare", "trainer"):
        assert len(one["peers"][peer]["seconds_per_step_of_each_turn"]) == 2 * 2
        assert len(one["peers"][peer]["cpu_seconds_per_step_of_each_turn"]) == 2 * 2
    assert all(len(ratio["values"]) == 2 for ratio in one["ratios"].values())
    tried = one["tokens_per_second_by_blocks"]
    assert list(tried) == ["cloze", "trainer"]
    assert list(tried["cloze"]) == list(tried["trainer"]) == ["8", "16"]
    assert one["peers"]["bare"]["blocks"] == one["peers"]["cloze"]["blocks"]
    assert list(work.iterdir()) == []


def test_without_a_gpu_its_table_is_refused_in_one_line(tmp_path: Path, capsys):
    for what in ("train", "step"):
        with pytest.raises(SystemExit) as leaving:
            main(["bench", what, "--gpu", "--work_dir", str(tmp_path / "work")])
        assert leaving.value.code == 2
        error = capsys.readouterr().err
        assert error == "cloze: error: --gpu: there is no GPU here; without --gpu it measures the CPU\n"
    assert not (tmp_path / "work").exists()


class Machine:
    """Peers whose step takes `seconds[batch]`; batches that are not there do not fit."""

    def __init__(self, seconds: dict[int, float]):
        self.seconds = seconds

    def run(self, name: str, batch: int, steps: int) -> Turn:
        """As `Peers.run`."""
        if batch not in self.seconds:
            raise OutOfMemory(f"{batch} blocks")
        return Turn(self.seconds[batch], 0.0, 0, 0)


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        ({8: 1.0, 16: 1.2, 32: 2.0, 64: 4.0}, 32, [8, 16, 32, 64]),  # no faster
        ({8: 1.0, 16: 1.2}, 16, [8, 16, 32]),  # does not fit
        ({8: 1.0, 16: 1.98}, 16, [8, 16]),  # hardly faster, which is the end
        ({8: 1.0, 16: 3.0}, 8, [8, 16]),  # slower
        ({1: 1.0, 2: 1.5}, 2, [8, 4, 2]),  # the first does not fit
    ],
)
def test_a_peer_gets_the_batch_at_which_it_is_fastest(seconds: dict[int, float], best: int, tried: list[int]):
    search = best_batch(Machine(seconds), "cloze", block_size=128, first_tokens=8 * 128)
    assert search.batch == best
    assert search.seconds == seconds[best]
    assert list(search.tried) == tried
    assert all((rate is not None) == (batch in seconds) for batch, rate in search.tried.items())


def test_where_not_one_block_fits_the_search_says_so():
    with pytest.raises(OutOfMemory):
        best_batch(Machine({}), "cloze", block_size=128)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_made_up_blocks_are_a_prepared_folder(tmp_path: Path, packing: str):
    size = SIZES["tiny-32"]
    prepared = make_data(tmp_path / "data", size, packing, num_tokens=5_000)
    verify_prepared(prepared.folder)
    ids = prepared.blocks("train").read(np.arange(len(prepared.blocks("train"))))
    assert ids.shape[1] == prepared.block_size == size.block_size
    assert ids.max() < size.vocab_size - 1
    assert len(load_tokenizer(str(prepared.tokenizer_dir))) == size.vocab_size
    shares = shares_of(prepared)
    special = np.isin(ids, prepared.manifest["tokenizer"]["special_token_ids"])
    assert shares.maskable == 1 - special.mean()
    assert shares.real == (1.0 if packing == "concat" else (ids != 1).mean())
    assert (packing == "concat") == (1 not in ids)
    assert prepared.blocks("train").has_pieces == (packing == "best_fit")


class Crowd:
    """Peers on a machine that slows down from turn to turn; the compiled one fails in its third turn. A step takes
    10 ms per block, Trainer's 20 ms; at most 64 blocks fit (Trainer: 16); Cloze's process compiles something in its
    last turn. `noise`: the factor by which two of every five turns take longer."""

    noise = 1.0

    def __init__(self, *_: object):
        self.turns = self.all_turns = self.compiled_turns = 0

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, name: str, batch: int, steps: int) -> Turn:
        """As `Peers.run`."""
        self.compiled_turns += name == "compiled"
        if self.compiled_turns == 5:  # two calls are the warm-up
            self.compiled_turns = 0
            raise PeerFailed("Traceback (most recent call last):\nRuntimeError: no such kernel")
        if batch > (16 if name == "trainer" else 64):
            raise OutOfMemory(f"{batch} blocks")
        self.turns += name == "cloze"
        self.all_turns += 1
        work = 0.01 * batch * (2 if name == "trainer" else 1) / (1 + batch / 100) * (1.1 if name == "cloze" else 1)
        seconds = work * (1 + self.all_turns / 1000) * (self.noise if self.all_turns % 5 < 2 else 1)
        return Turn(seconds, work, 2**30, int(name == "cloze" and self.turns > 17))


def test_the_gpu_table_keeps_what_it_has_and_goes_on_without_a_peer_that_breaks(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Peers", Crowd)
    monkeypatch.setattr(train, "best_batch", partial(best_batch, first_tokens=8 * 32))
    monkeypatch.setattr(train, "make_data", partial(make_data, num_tokens=5_000))
    table = Table("training steps", train.COLUMNS)
    done = train.compare(BenchConfig(what="train", gpu=True), "tiny-32", SIZES["tiny-32"], tmp_path / "a")
    train.add_rows(table, done, gpu=False)
    rows = {row[0].removeprefix("tiny-32: "): row[1:] for row in table.rows}
    assert {len(row) for row in table.rows} == {len(train.COLUMNS)}
    assert rows["cloze train, compiled: failed"] == [None] * (len(train.COLUMNS) - 1)
    assert "compiled failed (PeerFailed: RuntimeError: no such kernel)" in capsys.readouterr().err
    cloze_row, bare, trainer = (rows[train.PEERS[name]] for name in ("cloze", "bare", "trainer"))
    assert (cloze_row[0], bare[0], trainer[0]) == (64, 64, 16)  # Trainer's own; the bare loop's is Cloze's
    assert (cloze_row[-1], bare[-1]) == (1, 0)
    gain = (2 / 1.16) / (1.1 / 1.64)  # per token, not per step; the machine's drift cancels
    for what in ("time", "CPU time"):
        assert rows[f"{what} per token, Trainer / cloze train"][3:6] == [f"{gain:.3f} x"] * 3
        assert rows[f"{what} per step, cloze train / bare loop"][3:6] == ["1.100 x"] * 3
    assert table.notes == []
    details = train.details_of(done, gpu=True)
    assert details["failed"] == {"compiled": "Traceback (most recent call last):\nRuntimeError: no such kernel"}
    assert details["ratios"].keys() == {
        "time per token, Trainer / cloze train",
        "time per step, cloze train / bare loop",
    }
    assert details["ratios"]["time per step, cloze train / bare loop"]["values"] == pytest.approx([1.1] * 6)
    for peer in details["peers"].values():
        assert len(peer["seconds_per_step_of_each_turn"]) == len(peer["cpu_seconds_per_step_of_each_turn"]) == 12


def test_too_large_a_spread_is_reported_below_the_table_and_in_its_file(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Peers", Crowd)
    monkeypatch.setattr(Crowd, "noise", 3.0)
    totals: list[int] = []
    monkeypatch.setattr(train, "progress", lambda *_, total, unit: totals.append(total) or nullcontext(lambda _: None))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(train, "make_data", partial(make_data, num_tokens=5_000))
    output = tmp_path / "bench.json"
    config = BenchConfig(what="train", sizes="tiny-32", work_dir=str(tmp_path), output=str(output))
    train.bench_train(config).show(output)
    found = json.loads(output.read_text())
    ratio = found["sizes"]["tiny-32"]["ratios"]["time per step, cloze train / bare loop"]
    low, high = ratio["interval_95"]
    line = (
        f"tiny-32: time per step, cloze train / bare loop: {ratio['median']:.4g} x ({low:.4g} to {high:.4g}) over 15"
    )
    line += " pairs: the spread is too large to quote this figure; run again on an idle machine"
    assert line in found["notes"]
    assert totals == [sum(len(peer["peak_bytes"]) for peer in found["sizes"]["tiny-32"]["peers"].values())]
    printed = capsys.readouterr().out.splitlines()
    assert line in printed
    assert any("OMP_WAIT_POLICY=passive" in text for text in printed)
    assert ratio["verdict"] == line.rpartition(": ")[2]
    assert not [note for note in found["notes"] if "CPU time" in note]  # not affected by the noise


def test_a_table_that_is_cut_short_is_written_up_to_there(tmp_path: Path, monkeypatch):
    measured = train.Comparison("tiny-32", SIZES["tiny-32"], train.Shares(1.0, 0.9))

    def compare(config: BenchConfig, name: str, *_: object) -> train.Comparison:
        if name != "tiny-32":
            raise KeyboardInterrupt
        return measured

    monkeypatch.setattr(train, "compare", compare)
    config = BenchConfig(what="train", sizes="tiny-32,roberta-base-512", output=str(tmp_path / "bench.json"))
    with pytest.raises(KeyboardInterrupt):
        train.bench_train(config)
    assert list(json.loads((tmp_path / "bench.json").read_text())["sizes"]) == ["tiny-32"]
