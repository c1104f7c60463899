"""The report of runs: what is in its page, what never gets into it, and what is said of runs that cannot be read."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from report_pages import CONFIG, SCORES, SESSIONS, curve_of, data_of, lines_of, make_run, page_of
from safetensors.torch import save_file

from cloze.cli.commands import report
from cloze.config import ReportConfig
from cloze.config.parser import parse
from cloze.errors import ClozeError, ConfigError, DataError, DiskError
from cloze.tools.report.curves import MOST_POINTS, clock_of, points_of, smoothed, thinned
from cloze.tools.report.gather import gather_runs, names_of, num_parameters, read_lines
from cloze.tools.report.page import embedded


def words_of(page: str) -> str:
    """What a person reads of the page, without the charts."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_every_number_that_was_logged_is_in_the_curves(tmp_path: Path):
    page = page_of(make_run(tmp_path / "a"))
    lines = [line for line in lines_of() if "loss" in line]
    for chart, kind, name in (
        ("loss", "raw", "loss"),
        ("throughput", "raw", "tokens_per_second"),
        ("memory", "line", "memory_gib"),
        ("learning_rate", "line", "learning_rate"),
        ("grad_norm", "raw", "grad_norm"),
    ):
        curve = curve_of(page, chart, kind)
        assert curve["step"] == [line["step"] for line in lines]
        assert curve["value"] == pytest.approx([line[name] for line in lines], rel=1e-6)
        assert curve["time"] == [2.0 * number for number in range(1, len(lines) + 1)]
    measured = [line for line in lines_of() if "eval_loss" in line]
    assert curve_of(page, "perplexity", "measured")["step"] == [0, 20, 40, 60]
    assert curve_of(page, "loss", "measured")["value"] == pytest.approx([line["eval_loss"] for line in measured])
    assert "mfu" not in {chart["name"] for chart in data_of(page)["charts"]}


def test_runs_share_their_charts_and_each_keeps_its_restarts(tmp_path: Path):
    other = make_run(tmp_path / "b", lines_of(100, offset=1.0), sessions={"sessions": SESSIONS[:1]})
    page = page_of(make_run(tmp_path / "a"), other)
    assert [run["name"] for run in data_of(page)["runs"]] == ["a", "b"]
    (restart,) = data_of(page)["runs"][0]["restarts"]
    assert (restart["step"], restart["time"]) == (20, 8.0)
    assert restart["what"] == "8 x NVIDIA H100; 8 ranks on 2 hosts, DeepSpeed ZeRO-2, bf16"
    assert data_of(page)["runs"][1]["restarts"] == []
    assert curve_of(page, "loss", "raw", run=1)["step"][-1] == 100
    alt = data_of(page)["charts"][0]["alt"]
    assert alt.startswith("Loss, nats per masked token, by optimizer step. a: from ")
    assert "b, validation: from 8.4 at step 0 to 4 at step 100; lowest 4 at step 100" in alt


def test_the_page_says_what_was_measured_on_what_with_what(tmp_path: Path):
    words = words_of(page_of(make_run(tmp_path / "mine")))
    for told in (
        "mine",
        "roberta, trained on corpus.jsonl",
        "Perplexity 6.500 95 %: 6.100 to 6.900",
        "Tokens seen 61.4k 2 epochs",
        "Time 0:24 1 restart",
        "1,234 masked tokens of 99 blocks of the split validation (15 % of the tokens masked)",
        "the 100 most frequent 0.5000 87.50 % 1,000",
        "training 4,000 documents, 900,000 tokens, 7,031 blocks",
        "tokenizer mine, 50,265 tokens",
        "checksum 0123456789abcdef",
        "step 21 8 x NVIDIA H100; 8 ranks on 2 hosts, DeepSpeed ZeRO-2, bf16 torch 2.99",
        "checkpoint-40 12.3 kB 403.4",
        "learning_rate 2e-05",
        "dataset_name prepared",
        "deepspeed zero2.json",
    ):
        assert told in words, told


def test_bars_and_intervals_are_as_long_as_their_numbers(tmp_path: Path):
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", scores=SCORES | {"perplexity_interval": [5, 7]}))
    assert re.findall(r'class="bar r0" style="--to:([\d.]+)%"', page) == ["25.00", "100.00"]
    lows = [float(low) for low in re.findall(r'class="range r\d" style="--low:([\d.]+)%', page)]
    highs = [float(high) for high in re.findall(r"--high:([\d.]+)%", page)]
    assert (highs[1] - lows[1]) / (highs[0] - lows[0]) == pytest.approx(2.0 / 0.8, abs=0.01)


def test_what_differs_between_runs_is_marked_and_defaults_are_apart(tmp_path: Path):
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", config=CONFIG | {"learning_rate": 1e-3}))
    assert [re.sub("<[^>]*>", " ", row).split() for row in re.findall('<tr class="differs">(.*?)</tr>', page)] == [
        ["learning_rate", "2e-05", "0.001"]
    ]
    details = page[page.index("<details>") :]
    assert "optim_args" in details
    assert "learning_rate" not in details.split("</details>")[0]


def test_results_on_other_masks_are_not_called_comparable(tmp_path: Path):
    same = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert "The masks are the same" in words_of(same)
    other = make_run(tmp_path / "c", scores=SCORES | {"seed": 43})
    assert "cannot be compared" in words_of(page_of(tmp_path / "a", other))


def test_no_secret_path_or_host_of_the_machine_gets_in(tmp_path: Path):
    page = page_of(make_run(tmp_path / "a"))
    for never in ("hf_secret", "/home/me", str(tmp_path), "host-17"):
        assert never not in page, never


def test_the_page_names_no_address_and_forbids_every_request(tmp_path: Path):
    page = page_of(make_run(tmp_path / "a"))
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import\s*(\S+)""", page)
    assert [one for one in links if any(one)] == [("data:,", "", "")]
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_nothing_in_a_run_can_become_markup_or_script(tmp_path: Path):
    evil = "</script><img src=x onerror=alert(1)><!--{{data}}"
    sessions = {"sessions": [SESSIONS[0], SESSIONS[1] | {"engine": evil}]}
    config = CONFIG | {"model_type": evil, "optim_args": evil}
    run = make_run(tmp_path / "a<b>&amp;", config=config, scores=SCORES | {"split": evil}, sessions=sessions)
    page = page_of(run)
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert data_of(page)["runs"][0]["name"] == "a<b>&amp;"
    assert json.loads(embedded({"x": evil}))["x"] == evil


def test_long_curves_keep_their_ends_and_every_peak():
    points = [(float(step), step / 10, math.sin(step / 50)) for step in range(100_000)]
    points[31_415] = (31_415.0, 3141.5, 99.0)
    points[27_182] = (27_182.0, 2718.2, -99.0)
    short = thinned(points, MOST_POINTS)
    assert len(short) <= MOST_POINTS
    assert short == sorted(short)
    assert (short[0], short[-1]) == (points[0], points[-1])
    assert {points[31_415], points[27_182]} <= set(short)
    assert thinned(points[:MOST_POINTS], MOST_POINTS) == points[:MOST_POINTS]


def test_a_smoothed_curve_is_the_weighted_mean_around_each_point():
    points = [(step, 0.0, value) for step, value in ((1, 3.0), (2, 5.0), (4, 1.0), (9, 2.0))]
    for at, (step, _, _) in enumerate(points):
        weights = [math.exp(-abs(step - other) / 2.5) for other, _, _ in points]
        mean = sum(w * p[2] for w, p in zip(weights, points, strict=True)) / sum(weights)
        assert smoothed(points, 2.5, 4)[at][2] == pytest.approx(mean)
    assert [value for _, _, value in smoothed([(s, 0.0, 7.0) for s in range(50)], 5.0, 50)] == pytest.approx(
        [7.0] * 50
    )
    assert [step for step, _, _ in smoothed([(s, 0.0, 7.0) for s in range(50)], 5.0, 8)] == [
        0,
        7,
        14,
        21,
        28,
        35,
        42,
        49,
    ]


def test_time_is_that_of_training_and_values_that_are_no_numbers_are_left_out():
    lines = [
        {"step": 0, "eval_loss": 8.0},
        {"step": 5, "loss": 4.0, "seconds": 1.5},
        {"step": 10, "loss": None, "seconds": 2.0},
        {"step": 11, "skipped": True},
        {"step": 15, "loss": 3.0, "seconds": None},
        {"step": 20, "loss": float("nan"), "seconds": 1.0},
        {"step": 20, "eval_loss": 3.5},
    ]
    assert points_of(lines, "loss", clock_of(lines)) == [(5, 1.5, 4.0), (15, 3.5, 3.0)]
    assert points_of(lines, "eval_loss", clock_of(lines)) == [(0, 0.0, 8.0), (20, 4.5, 3.5)]


def test_damaged_lines_are_counted_and_a_line_that_is_being_written_is_not(tmp_path: Path, capsys: Any):
    good = [json.dumps(line) for line in lines_of()]
    torn = (
        "\n".join([*good[:3], '{"step": 3', "[1, 2]", "\x00\x00", '{"loss": 3.0}', *good[3:], ""]) + '{"step": 61, "lo'
    )
    run = make_run(tmp_path / "a", torn)
    lines, damaged = read_lines(run / "metrics.jsonl")
    assert (lines, damaged) == (lines_of(), 4)
    report.run(ReportConfig(runs=[str(run)]))
    warnings = f"cloze: warning: {run / 'metrics.jsonl'}: lines 4, 5, 6, 7 are damaged and left out\n"
    assert warnings == capsys.readouterr().err
    assert "a: 4 damaged lines of metrics.jsonl were left out" in (run / "report.html").read_text()


def refused(kind: type[ClozeError], words: str, **values: Any) -> None:
    with pytest.raises(kind, match=words) as caught:
        report.run(ReportConfig(**values))
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path):
    run = make_run(tmp_path / "a")
    refused(ConfigError, "nowhere: no such run; give the output_dir", runs=[str(run), "nowhere"])
    refused(ConfigError, "given twice", runs=[str(run), str(run / ".." / "a")])
    refused(DiskError, "is a folder, not a file; put it elsewhere", runs=[str(run)], output=str(tmp_path))
    refused(ConfigError, "give a run's folder", runs=[])
    refused(DataError, "nowhere.txt: cannot be read", runs=[str(run)], prompts="nowhere.txt")
    (run / "metrics.jsonl").write_text("rubbish\n" * 3)
    refused(DataError, "metrics.jsonl: all 3 lines are damaged", runs=[str(run)])
    (run / "metrics.jsonl").write_text("")
    refused(DataError, "metrics.jsonl: holds no line yet", runs=[str(run)])
    (run / "metrics.jsonl").unlink()
    refused(DataError, "metrics.jsonl: is not there; give the output_dir", runs=[str(run)])
    assert not (run / "report.html").exists()


def test_a_run_that_left_nothing_but_metrics_has_a_report(tmp_path: Path):
    nothing = dict.fromkeys(("config", "data", "scores", "sessions"))
    words = words_of(page_of(make_run(tmp_path / "a", [{"step": 1, "loss": 3.0}], **nothing)))
    assert "a masked language model" in words
    assert "Evaluation" not in words


def test_files_that_hold_something_else_are_passed_over(tmp_path: Path):
    odd = {"sessions": [7, {"first_step": "x"}, {"first_step": 3, "devices": [1]}]}
    scores = {"perplexity": 4.0, "perplexity_interval": "wide", "bands": {"x": 3}, "blocks": "many"}
    run = make_run(tmp_path / "a", config={"learning_rate": [1]}, data={"splits": 3}, scores=scores, sessions=odd)
    assert "4.000" in words_of(page_of(run))
    (run / "eval.json").write_text("{")
    (run / "config.yaml").write_text("- a\n:")
    assert "Perplexity 148.4 last evaluation of training" in words_of(page_of(run))


def test_runs_of_the_same_name_are_told_apart_and_the_command_takes_many(tmp_path: Path):
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/one/a"), Path("/x/two/a")]) == ["one/a", "two/a"]
    command, config = parse(["report", "runs/a", "--output", "o.html", "runs/b", "runs/c"])
    assert (command, config.runs, config.output) == ("report", ["runs/a", "runs/b", "runs/c"], "o.html")
    with pytest.raises(ConfigError, match="runs"):
        parse(["report"])


def test_parameters_are_counted_from_the_headers_of_a_model(tmp_path: Path):
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert num_parameters(tmp_path) == 18
    (tmp_path / "more.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0rubbish")
    assert num_parameters(tmp_path) is None
    assert num_parameters(tmp_path / "nowhere") is None


def test_a_report_loads_no_torch_and_is_the_same_again(tmp_path: Path):
    run = make_run(tmp_path / "a")
    script = (
        "import sys\nfrom cloze.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pickle', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "report", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").read_text() == page_of(run)


def scored_at(step: int) -> dict[str, Any]:
    lineage = {"kind": "trained", "run": None, "steps": [step], "weights": f"of {step}", "dtype": "fp32"}
    return SCORES | {"lineage": lineage}


def test_an_evaluation_that_is_older_than_the_newest_checkpoint_is_named(tmp_path: Path):
    run = make_run(tmp_path / "a", scores=scored_at(10))
    (run / "checkpoint-40" / "checkpoint.json").write_text("{}")
    page = words_of(page_of(run))
    assert "a: eval.json is of step 10, and checkpoint-40 is newer" in page
    assert "last evaluation of training, step 60" in page
    again = make_run(tmp_path / "b", scores=scored_at(60))
    assert "eval.json is of" not in words_of(page_of(again))
    assert "; step 60" in words_of(page_of(again))


def test_an_evaluation_of_another_run_is_left_out(tmp_path: Path):
    scores = scored_at(60)
    scores["lineage"]["run"] = "data-of another"
    run = make_run(tmp_path / "a", scores=scores)
    (run / "run.json").write_text(json.dumps({"seed": 7, "data": "abc"}))
    assert gather_runs([str(run)])[0].scores == {}


def test_evaluations_that_do_not_say_what_they_are_of_are_not_compared(tmp_path: Path):
    unknown = {key: value for key, value in SCORES.items() if key != "data_checksum"}
    runs = [make_run(tmp_path / name, scores=unknown) for name in ("a", "b")]
    assert "cannot be compared" in words_of(page_of(*runs))
