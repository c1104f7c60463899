"""Jobs on a real SLURM cluster of two nodes: the chain, and everything that ends a job before its work is done."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed
from repository import ROOT

from cloze.checkpoint.format import verify_checkpoint
from cloze.checkpoint.reader import PieceReader
from slurm import Cluster, make_workplace

STEPS = 60
TRAIN = ["--nodes=2", "--cpus-per-task=2", "slurm/train.sbatch", "tiny.yaml"]


@pytest.fixture(autouse=True)
def a_quiet_cluster(cluster: Cluster) -> Iterator[None]:
    """Whatever a test leaves behind is none of the next one's business."""
    wait_for_nodes(cluster)
    yield
    cluster.run("scancel", "--user=root", check=False)


def lines_of(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


def contents(run: Path, step: int) -> dict[tuple[str, str], int]:
    """Checksums of all weights and moments of a checkpoint, whoever wrote which piece of them."""
    folder = run / f"checkpoint-{step}"
    return PieceReader(folder, verify_checkpoint(folder)).sums()


def logs_of(workplace: Path) -> str:
    files = [*workplace.glob("*.out"), *workplace.glob("run*/slurm/*.out"), *workplace.glob("run*/slurm/*.log")]
    return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)


@pytest.fixture
def blocks(workplace: Path, prepared: Path) -> Path:
    """The workplace, its blocks made already."""
    shutil.copytree(prepared, workplace / "blocks")
    return workplace


def train(cluster: Cluster, workplace: Path, *more: str, steps: int = STEPS, flags: tuple[str, ...] = ()) -> str:
    """Submit one process on each of two nodes that saves at the end only, or when it has to."""
    flags = ("--max_steps", str(steps), "--save_steps", str(steps), *flags)
    return cluster.sbatch(*more, *TRAIN, *flags, cwd=workplace)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same job in one go."""
    made: dict[int, Path] = {}

    def run(steps: int) -> Path:
        if steps not in made:
            folder = make_workplace(tmp_path_factory.mktemp("undisturbed"), prepared)
            shutil.copytree(prepared, folder / "blocks")
            cluster.wait(train(cluster, folder, steps=steps), "COMPLETED", logs=lambda: logs_of(folder))
            made[steps] = folder / "run"
        return made[steps]

    return run


def wait_for_steps(cluster: Cluster, workplace: Path, steps: int) -> None:
    run = workplace / "run"
    for _ in cluster.until(120):
        if len(lines_of(run)) >= steps:
            return
    raise AssertionError(logs_of(workplace))


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_chain_ends_with_the_perplexity_of_one_machine(
    cluster: Cluster, workplace: Path, prepared: Path, stage: int
):
    """slurm/submit: prepare as an array, train on 2 nodes x 2 processes, consolidate, evaluate."""
    words = ["--nodes", "2", "--processes_per_node", "2", "--cpus_per_task", "2", "--prepare_tasks", "2"]
    words += ["--ds_config", f"ds_configs/zero{stage}.json"]
    told = cluster.run("slurm/submit", "tiny.yaml", *words, "--", "--max_steps", "20", cwd=workplace)
    ids = dict(re.findall(r"^submit +(\d+)  (\w+)", told, re.MULTILINE))
    assert list(ids.values()) == ["prepare", "join", "train", "evaluate"]
    assert f"scancel {' '.join(ids)}" in told
    for job in ids:
        cluster.wait(job, "COMPLETED", logs=lambda: logs_of(workplace))
    run = workplace / "run"
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (workplace / "blocks", prepared)]
    assert manifests[0]["checksum"] == manifests[1]["checksum"]
    train_id = next(job for job, name in ids.items() if name == "train")
    main = (run / "slurm" / f"train-{train_id}.out").read_text()
    assert f"4 ranks on 2 hosts, DeepSpeed ZeRO-{stage}" in main
    assert "CLOZE_SECRET" not in main, "the hosts share a secret"
    assert {path.name for path in (run / "slurm").glob("*.log")} == {f"train-{train_id}-node{i}.log" for i in (1, 2)}

    alone = workplace / "alone"
    flags = [*TINY_MODEL_NO_DROPOUT, "--learning_rate", "1e-3", "--per_device_train_batch_size", "16", "--use_cpu"]
    flags += ["--max_steps", "20", "--save_steps", "20", "--logging_steps", "1"]
    argv = ["train", *flags, "--dataset_name", str(prepared), "--output_dir", str(alone)]
    succeed(cloze_ranks(argv, 1, "single", workplace / "log"))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    succeed(cloze_ranks(["evaluate", str(alone), "--data", str(prepared)], 1, "single", workplace / "log"))
    here, there = (json.loads((folder / "eval.json").read_text())["perplexity"] for folder in (run, alone))
    assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.slow
def test_another_engine_than_deepspeed_is_named_by_accelerates_configuration(cluster, blocks, undisturbed):
    (blocks / "slurm" / "site.env").write_text("export ACCELERATE_CONFIG=launch/accelerate/fsdp2.yaml\n")
    cluster.wait(train(cluster, blocks, steps=20), "COMPLETED", logs=lambda: logs_of(blocks))
    assert "2 ranks on 2 hosts, FSDP2" in logs_of(blocks)
    assert losses(blocks / "run") == pytest.approx(losses(undisturbed(20)), rel=1e-5)


def preempted(cluster: Cluster, job: str, workplace: Path) -> None:
    urgent = cluster.sbatch("--partition=urgent", "--exclusive", "--nodes=2", "--wrap", "true", cwd=workplace)
    cluster.wait(urgent, "COMPLETED")


def requeued_from_outside(cluster: Cluster, job: str, workplace: Path) -> None:
    cluster.run("scontrol", "requeue", job)


def signalled(cluster: Cluster, job: str, workplace: Path) -> None:
    cluster.run("scancel", "--signal=USR1", "--batch", job)


def out_of_time(cluster: Cluster, job: str, workplace: Path) -> None:
    """The limit comes nearer than the margin that the job was submitted with; the controller looks every 30 s."""
    hours, minutes, _ = map(int, cluster.facts(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    for _ in cluster.until(150):
        if cluster.facts(job)["Restarts"] != "0":
            break
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def not_running(cluster: Cluster, job: str) -> None:
    for _ in cluster.until(60):
        if cluster.state(job) != "RUNNING":
            return
    raise AssertionError(cluster.facts(job))


def until_slurm_knows(cluster: Cluster, job: str, harm: str, mend: str, node: str) -> None:
    """A node is harmed, and whole again when the job has been ended for it."""
    cluster.tool(harm, node)
    not_running(cluster, job)
    cluster.tool(mend, node)


def powered_off(cluster: Cluster, job: str, workplace: Path) -> None:
    until_slurm_knows(cluster, job, "crash", "boot", "node2")


def head_powered_off(cluster: Cluster, job: str, workplace: Path) -> None:
    """The node with the batch script and rank 0."""
    until_slurm_knows(cluster, job, "crash", "boot", "node1")


def cable_cut(cluster: Cluster, job: str, workplace: Path) -> None:
    until_slurm_knows(cluster, job, "cut", "mend", "node2")


def daemon_killed(cluster: Cluster, job: str, workplace: Path) -> None:
    """Steps go on without slurmd; a new one finds them."""
    cluster.tool("kill-slurmd", "node2")
    time.sleep(1)
    cluster.tool("boot", "node2")


def controller_restarted(cluster: Cluster, job: str, workplace: Path) -> None:
    cluster.tool("kill-controller")
    time.sleep(1)
    cluster.tool("start-controller")


def slow(disturb: Callable[..., None]) -> object:
    return pytest.param(disturb, marks=pytest.mark.slow)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "disturb",
    [
        slow(preempted), slow(powered_off), slow(head_powered_off), slow(requeued_from_outside), slow(signalled),
        slow(cable_cut), slow(out_of_time),
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_job_that_is_ended_early_goes_on_and_ends_with_the_same_bits(
    cluster: Cluster, blocks: Path, undisturbed, disturb, figure
):
    steps = 400 if disturb is out_of_time else STEPS
    regularly = ("--save_steps", "10") if disturb in (powered_off, head_powered_off, cable_cut) else ()
    margin = ("--signal=B:USR1@90",) if disturb is out_of_time else ()
    job = train(cluster, blocks, *margin, steps=steps, flags=regularly)
    after = ("--dependency=afterok:" + job, "--kill-on-invalid-dep=yes", "--wrap", "true")
    next_in_chain = cluster.sbatch(*after, cwd=blocks)
    wait_for_steps(cluster, blocks, 25)
    disturb(cluster, job, blocks)
    begin, before = time.monotonic(), len(lines_of(blocks / "run"))
    for _ in cluster.until(150):
        if len(lines_of(blocks / "run")) > before and cluster.facts(job).get("Restarts") != "0":
            break
    figure(f"seconds from the end of the disturbance to the next step: {disturb.__name__}", time.monotonic() - begin)
    cluster.wait(job, "COMPLETED", logs=lambda: logs_of(blocks))
    facts = cluster.facts(job)
    assert facts["ExitCode"] == "0:0", logs_of(blocks)
    # Where a machine is gone the ranks know it before SLURM does, which may start the job there once more.
    assert 1 <= int(facts["Restarts"]) <= (3 if regularly or margin else 1), logs_of(blocks)
    cluster.wait(next_in_chain, "COMPLETED")
    assert [line["step"] for line in lines_of(blocks / "run")] == list(range(1, steps + 1))
    assert contents(blocks / "run", steps) == contents(undisturbed(steps), steps)
    assert [cluster.processes(node) for node in ("node1", "node2")] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [daemon_killed, controller_restarted], ids=lambda f: f.__name__)
def test_a_job_does_not_notice_that_slurm_itself_was_away(cluster: Cluster, blocks: Path, undisturbed, disturb):
    job = train(cluster, blocks)
    wait_for_steps(cluster, blocks, 25)
    disturb(cluster, job, blocks)
    cluster.wait(job, "COMPLETED", logs=lambda: logs_of(blocks))
    assert cluster.facts(job)["Restarts"] == "0"
    assert contents(blocks / "run", STEPS) == contents(undisturbed(STEPS), STEPS)
    assert [cluster.processes(node) for node in ("node1", "node2")] == [[], []]


def wait_for_nodes(cluster: Cluster) -> None:
    for _ in cluster.until(60):
        if cluster.run("sinfo", "-N", "--noheader", "--partition=main", "--format=%T").split() == ["idle"] * 2:
            return
    raise AssertionError(cluster.run("sinfo", "-N", "--long") + cluster.run("squeue"))


@pytest.mark.slow
def test_where_a_node_is_lost_for_good_the_run_goes_on_with_the_other(cluster: Cluster, blocks: Path, undisturbed):
    """Submitted with --nodes=1-2 and FULL_NODES, as slurm/submit does for --min_nodes 1."""
    words = ["--nodes=1-2", *TRAIN[1:], "--max_steps", str(STEPS), "--save_steps", "10"]
    job = cluster.sbatch(*words, cwd=blocks, FULL_NODES="2")
    wait_for_steps(cluster, blocks, 25)
    assert cluster.facts(job)["NumNodes"] == "2"
    cluster.tool("crash", "node2")
    try:
        not_running(cluster, job)
        cluster.wait(job, "COMPLETED", logs=lambda: logs_of(blocks))
        assert cluster.facts(job)["NumNodes"] == "1"
    finally:
        cluster.tool("boot", "node2")
    run = blocks / "run"
    assert losses(run) == pytest.approx(losses(undisturbed(STEPS)), rel=1e-5)
    assert [line["samples_seen"] for line in lines_of(run)] == [8 * step for step in range(1, STEPS + 1)]


@pytest.mark.slow
def test_a_job_that_begins_on_fewer_nodes_takes_the_batch_of_all(cluster: Cluster, blocks: Path, undisturbed):
    words = ["--nodes=1", *TRAIN[1:], "--max_steps", str(STEPS)]
    cluster.wait(cluster.sbatch(*words, cwd=blocks, FULL_NODES="2"), "COMPLETED", logs=lambda: logs_of(blocks))
    assert losses(blocks / "run") == pytest.approx(losses(undisturbed(STEPS)), rel=1e-5)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_queued_again(cluster: Cluster, blocks: Path):
    job = train(cluster, blocks, steps=100000)
    wait_for_steps(cluster, blocks, 5)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", logs=lambda: logs_of(blocks))
    assert len(list((blocks / "run").glob("checkpoint-*"))) == 1
    assert [cluster.processes(node) for node in ("node1", "node2")] == [[], []]


def test_what_a_person_has_to_mend_ends_the_chain_at_once(cluster: Cluster, workplace: Path):
    """The corpus has no such field: preparing fails for good, and nothing waits for it."""
    (workplace / "tiny.prepare.yaml").write_text(
        (workplace / "tiny.prepare.yaml").read_text().replace("answers.text", "no.such.field")
    )
    told = cluster.run("slurm/submit", "tiny.yaml", "--prepare_tasks", "2", "--cpus_per_task", "1", cwd=workplace)
    prepare, *others = re.findall(r"^submit +(\d+)  \w+", told, re.MULTILINE)
    cluster.wait(prepare, "FAILED")
    assert cluster.facts(prepare)["ExitCode"] == "2:0"
    assert [cluster.wait(job) for job in others] == ["CANCELLED"] * 3
    assert "no.such.field" in (workplace / "run" / "slurm" / f"prepare-{prepare}_0.out").read_text()


@pytest.mark.slow
def test_training_that_a_person_has_to_mend_is_not_tried_again(cluster: Cluster, blocks: Path):
    """Two nodes whose launchers and srun end with codes of their own: what counts is rank 0's."""
    job = train(cluster, blocks, flags=("--dataset_name", "./nowhere"))
    cluster.wait(job, "FAILED", logs=lambda: logs_of(blocks))
    assert (cluster.facts(job)["Restarts"], cluster.facts(job)["ExitCode"]) == ("0", "2:0"), logs_of(blocks)
    assert "error: nowhere: no such folder" in (blocks / f"cloze-train-{job}.out").read_text()


@pytest.mark.slow
def test_restarts_that_bring_nothing_come_to_an_end(cluster: Cluster, blocks: Path):
    """A launcher that fails each time, found through the site's settings."""
    (blocks / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", blocks / "slurm")
    (blocks / "broken").mkdir()
    script = f'#!/bin/sh\ncase "$*" in *cloze.tools.launch.launcher*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    (blocks / "broken" / "python").write_text(script)
    (blocks / "broken" / "python").chmod(0o755)
    (blocks / "slurm" / "site.env").write_text('export PATH="$PWD/broken:$PATH" MAX_RESTARTS=1\n')
    job = train(cluster, blocks)
    cluster.wait(job, "FAILED", logs=lambda: logs_of(blocks))
    assert (cluster.facts(job)["Restarts"], cluster.facts(job)["ExitCode"]) == ("2", "1:0")
    assert "2 starts ended without a checkpoint after step 0" in (blocks / f"cloze-train-{job}.out").read_text()


@pytest.mark.slow
def test_a_task_that_fails_is_queued_again_and_gives_up_in_the_end(cluster: Cluster, workplace: Path):
    """`cloze` is broken on the nodes: its exit code is 1, which may go well the next time."""
    (workplace / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", workplace / "slurm")
    (workplace / "broken").mkdir()
    (workplace / "broken" / "cloze").write_text("#!/bin/sh\nexit 1\n")
    (workplace / "broken" / "cloze").chmod(0o755)
    (workplace / "slurm" / "site.env").write_text('export PATH="$PWD/broken:$PATH" MAX_RESTARTS=1\n')
    job = cluster.sbatch("--cpus-per-task=1", "slurm/prepare.sbatch", "tiny.prepare.yaml", cwd=workplace)
    cluster.wait(job, "FAILED", logs=lambda: logs_of(workplace))
    assert (cluster.facts(job)["Restarts"], cluster.facts(job)["ExitCode"]) == ("1", "1:0")


@pytest.mark.slow
def test_each_seed_is_a_run_of_its_own(cluster: Cluster, blocks: Path):
    words = ["--seeds", "2", "--nodes", "1", "--cpus_per_task", "2", "--", "--max_steps", "3"]
    told = cluster.run("slurm/submit", "tiny.yaml", *words, cwd=blocks)
    for job in re.findall(r"^submit +(\d+)  \w+", told, re.MULTILINE):
        for seed in (1, 2):
            cluster.wait(f"{job}_{seed}", "COMPLETED", logs=lambda: logs_of(blocks))
    scores = [json.loads((blocks / f"run-seed{seed}" / "eval.json").read_text())["loss"] for seed in (1, 2)]
    assert scores[0] != scores[1]
