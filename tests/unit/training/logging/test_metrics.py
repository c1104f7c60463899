"""What a line of metrics says: losses of the steps that counted, real and masked tokens, operations, utilization."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cloze.checkpoint.run_folder import read_metrics
from cloze.data.batches.layout import Layout
from cloze.distributed.resilience.stack_dump import write_stacks
from cloze.errors import ClozeError, DataError, DiskError
from cloze.training.logging import metrics
from cloze.training.logging.metrics import Throughput, Window
from cloze.training.run_schedule import Plan
from cloze.utils import run_files
from cloze.utils.atomic_files import append_text

CPU = torch.device("cpu")
PLAN = Plan(Layout(4, 1, 0, 2), num_blocks=1000, block_size=32, total_samples=10**6, total_steps=10**5)


def add(window: Window, loss: float, refused: bool, num_masked: int) -> None:
    window.add(torch.tensor(loss, dtype=torch.float64), torch.tensor(refused), torch.tensor(num_masked))


def test_a_refused_step_has_tokens_but_no_loss():
    window = Window(0, CPU)
    add(window, 3.0, False, 40)
    add(window, float("nan"), True, 38)
    add(window, 5.0, False, 42)
    assert window.sums.tolist() == [8.0, 2.0, 120.0]


def test_a_step_without_masked_tokens_has_no_loss():
    window = Window(0, CPU)
    add(window, 0.0, False, 0)
    assert window.sums.tolist() == [0.0, 0.0, 0.0]
    add(window, 3.0, False, 40)
    assert window.close(2, window.sums.tolist(), PLAN, Throughput(None, None))["loss"] == 3.0


def test_speed_is_of_real_tokens_and_the_next_window_begins_anew(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 110.0, 110.0, 112.0, 112.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    window = Window(10, CPU)
    line = window.close(
        20, [30.0, 10.0, 400.0], PLAN, Throughput(token_flops=2e12 * 10 / 2560, peak_flops=1e13, filled=0.75)
    )
    assert line["loss"] == 3.0
    assert line["tokens_per_second"] == 10 * 8 * 32 * 0.75 / 10  # steps * blocks * tokens * filled / seconds
    assert line["masked_tokens_per_second"] == 40.0
    assert (line["tflops"], line["mfu"]) == (2.0, 0.2)
    assert line["memory_gib"] > 0
    after = window.close(21, [0.0, 0.0, 0.0], PLAN, Throughput(None, None))
    assert (after["loss"], after["tflops"], after["mfu"]) == (None, None, None)
    assert after["tokens_per_second"] == 8 * 32 / 2


def test_waiting_for_data_counts_as_such():
    class Slow:
        def __iter__(self):
            time.sleep(0.05)
            yield "batch"

    window = Window(0, CPU)
    assert list(window.timed(Slow())) == ["batch"]
    assert 0.5 < window.close(1, [1.0, 1.0, 1.0], PLAN, Throughput(None, None))["data_wait"] <= 1.0


def test_a_resumed_run_reports_damaged_lines_and_keeps_the_file_that_had_them(tmp_path: Path, capsys):
    damaged = (
        '{"step": 1, "loss": 9.0}\n\x00\x00{"step": 2, "lo\n{"loss": 8.0}\n{"step": 3, "loss": 7.0}\n{"step": 4}\n'
    )
    path = tmp_path / run_files.METRICS
    path.write_text(damaged)
    main = SimpleNamespace(is_main_process=True)
    for _ in range(2):  # the second time nothing is damaged
        metrics.MetricsLog(tmp_path, main, start_step=3)
        assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 3]
    assert (tmp_path / f"{run_files.METRICS}.damaged-1").read_text() == damaged
    assert len(list(tmp_path.iterdir())) == 2
    assert f"{path}: lines 2, 3 are damaged and left out" in capsys.readouterr().err


def test_metrics_and_stacks_are_not_written_through_a_link(tmp_path: Path):
    lines = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "other").write_text(lines)
    (tmp_path / run_files.METRICS).symlink_to("other")
    with pytest.raises(ClozeError, match="link"):
        metrics.MetricsLog(tmp_path, SimpleNamespace(is_main_process=True), start_step=1)
    with pytest.raises(DiskError, match="cannot write"):
        append_text(tmp_path / run_files.METRICS, "{}")
    (tmp_path / "rank-3.txt").symlink_to("other")
    write_stacks(tmp_path, 3, "rank 3")
    assert (tmp_path / "other").read_text() == lines
    assert "test_metrics.py" in (tmp_path / "rank-3.txt").read_text()


def test_metrics_that_are_no_file_are_an_error_and_not_an_empty_run(tmp_path: Path):
    assert read_metrics(tmp_path) == []
    (tmp_path / run_files.METRICS).mkdir()
    with pytest.raises(DataError) as caught:
        read_metrics(tmp_path)
    assert Path(str(caught.value.where)).name == run_files.METRICS
