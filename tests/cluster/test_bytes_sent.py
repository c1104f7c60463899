"""What a step sends over the network, counted at the interfaces of two hosts, is what
`cloze.tools.planning.communication` says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts, why_not
from ranks import cloze_ranks, succeed
from repository import ROOT

from cloze.tools.planning.communication import bytes_per_step, fsdp_bytes_per_step

MODEL = "hidden_size=192,num_hidden_layers=3,num_attention_heads=2,intermediate_size=768"
BEGIN, END = 6, 14  # steps between which bytes are counted: DeepSpeed needs some to learn in what order it gathers

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def sent_so_far() -> int:
    """Bytes that went out of the interface of this process's host."""
    with open("/proc/self/net/dev") as table:
        return next(int(line.split(":")[1].split()[8]) for line in table if line.strip().startswith("eth0:"))


def counted(hosts: Hosts, folder: Path) -> Any:
    """To be called in a rank, one on each host: it writes what a step sent, and the model's size, into `folder`."""

    def install() -> None:
        import cloze.training.trainer as trainer
        from cloze.training.engines.fsdp2 import units

        rank = int(os.environ["RANK"])
        hosts["ab"[rank]].move_in()
        os.environ |= {"MASTER_ADDR": hosts["a"].address, "LOCAL_RANK": "0"}
        plain, seen = trainer.train_step, []

        def train_step(run: Any, batch: Any) -> Any:
            seen.append(sent_so_far())
            if len(seen) == END + 1:
                module = run.engine.module
                parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
                in_layers = sum(p.numel() for layer in units(module) for p in layer.parameters())
                a_step = (seen[END] - seen[BEGIN]) / (END - BEGIN)
                (folder / f"sent-{rank}").write_text(json.dumps([parameters, in_layers, a_step]))
            return plain(run, batch)

        trainer.train_step = train_step

    return install


@pytest.mark.parametrize(
    ("stage", "micro_batches"),
    [
        *(pytest.param(stage, m, marks=pytest.mark.slow) for stage, m in ((0, 1), (1, 1), (2, 1), (3, 1))),
        *(pytest.param(stage, m, marks=pytest.mark.slow) for stage, m in ((0, 2), (1, 2), (3, 2))),
        (2, 2),
        pytest.param("fsdp2", 1, marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_sends_what_the_formula_says(prepared, tmp_path, figure, stage, micro_batches: int):
    argv = ["train", "--model_type", "roberta", "--config_overrides", MODEL, "--max_steps", str(END + 1)]
    argv += ["--save_strategy", "no", "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    argv += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(micro_batches)]
    engine, name = ("fsdp2", "FSDP2") if stage == "fsdp2" else ("ddp", f"ZeRO-{stage}")
    argv += [] if stage == "fsdp2" else ["--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json")]
    with Hosts(["a", "b"], tmp_path) as hosts:
        succeed(cloze_ranks(argv, 2, engine, tmp_path / "log", counted(hosts, tmp_path)))
    for rank in range(2):
        parameters, in_layers, sent = json.loads((tmp_path / f"sent-{rank}").read_text())
        expected = (
            fsdp_bytes_per_step(parameters, in_layers, 4, 2, micro_batches, backend="gloo")
            if stage == "fsdp2"
            else bytes_per_step(parameters, 4, 2, stage, micro_batches, backend="gloo")
        )
        figure(f"MB a step and rank, {name}, {micro_batches} micro-batches, {parameters:,} parameters", sent / 1e6)
        figure(f"bytes counted / formula, {name}, {micro_batches} micro-batches", sent / expected)
        assert sent == pytest.approx(expected, rel=0.05)
