"""`cloze push` with the real Hub client, over HTTP, against the Hub of local_hub.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from local_hub import Fault, LocalHub, Repo
from pushing import READ, SCORES, STRANGER, WRITE, Client, accepted, refused
from transformers import AutoModelForMaskedLM, AutoTokenizer

MODEL = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PULL = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
repo, out = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(repo).eval()
ids = AutoTokenizer.from_pretrained(repo)("A whale is a <mask>.", return_tensors="pt")
torch.save(model(input_ids=ids["input_ids"]).logits.detach(), out)
"""


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("A whale is a <mask>.", return_tensors="pt")
    return model(input_ids=ids["input_ids"]).logits.detach()


def test_a_pushed_model_comes_back_the_same(
    hub: LocalHub, push: Client, client: Client, run_dir: Path, tmp_path: Path
):
    printed = accepted(push(run_dir, "--repo", "demo"))
    assert f"{hub.url}/user/demo/commit/{hub.repos['user/demo'].sha('main')}" in printed
    files = hub.files("user/demo")
    assert set(files) == MODEL
    for name in MODEL:
        assert files[name] == (run_dir / "model" / name).read_bytes()
    assert client("-c", PULL, "user/demo", tmp_path / "logits.pt", token=None).returncode == 0
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(run_dir / "model"))

    card = ModelCard(files["README.md"].decode())
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {kind: SCORES[kind] for kind in ("perplexity", "masked_accuracy")}
    assert card.data.model_name == "demo"
    assert 'pipeline("fill-mask", "user/demo")' in card.text


def test_no_secret_and_no_path_is_pushed_or_printed(hub: LocalHub, push: Client, run_dir: Path):
    done = push(run_dir, "--repo", "user/demo", "--token", WRITE, token=None)
    accepted(done)
    sent = b"".join(hub.received) + b"".join(hub.files("user/demo").values())
    assert b"perplexity" in sent
    for secret in (WRITE, "hf_secretofconfig", "/secret/place", str(run_dir)):
        assert secret.encode() not in sent
    for secret in (WRITE, "hf_secretofconfig", "/secret/place"):
        assert secret not in done.stdout + done.stderr


def test_private_and_revision_reach_the_hub(hub: LocalHub, push: Client, run_dir: Path):
    accepted(push(run_dir, "--repo", "team/demo", "--private", "--revision", "try/v2"))
    assert hub.repos["team/demo"].private
    assert set(hub.files("team/demo", "try/v2")) == MODEL
    assert hub.files("team/demo", "main") == {}


def test_a_private_push_never_lands_in_a_public_repository(hub: LocalHub, push: Client, run_dir: Path):
    hub.repos["user/demo"] = Repo(private=False)
    assert "public" in refused(push(run_dir, "--repo", "demo", "--private"))
    assert hub.files("user/demo") == {}


def test_pushing_the_same_again_makes_no_commit_and_says_so(hub: LocalHub, push: Client, run_dir: Path):
    accepted(push(run_dir, "--repo", "demo"))
    before = hub.files("user/demo")
    assert hub.requests("PUT", "") == 1
    commits = len(hub.repos["user/demo"].commits)
    assert "nothing has changed since" in accepted(push(run_dir, "--repo", "demo"))
    assert hub.files("user/demo") == before
    assert hub.requests("PUT", "") == 1
    assert len(hub.repos["user/demo"].commits) == commits


def test_old_weights_do_not_outlive_a_push_of_shards(
    hub: LocalHub, push: Client, client: Client, run_dir: Path, tmp_path: Path
):
    hub.repos["user/demo"] = Repo(private=False)
    hub.repos["user/demo"].commit("main", {"model.safetensors": b"of an older model", "mine.txt": b"kept"})
    accepted(push(run_dir / "sharded", "--repo", "demo"))
    names = set(hub.files("user/demo"))
    assert "model.safetensors" not in names
    assert {"model.safetensors.index.json", "mine.txt"} <= names
    download = "import sys, huggingface_hub; huggingface_hub.snapshot_download('user/demo', local_dir=sys.argv[1])"
    assert client("-c", download, tmp_path / "pulled", token=None).returncode == 0
    assert torch.equal(logits(tmp_path / "pulled"), logits(run_dir / "sharded"))


def test_a_dry_run_needs_no_hub_and_changes_nothing(hub: LocalHub, push: Client, run_dir: Path):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    printed = accepted(push(run_dir, "--repo", "demo", "--dry_run", token=None))
    size = (run_dir / "model" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in printed
    assert all(name in printed for name in MODEL)
    assert "training_args.bin" not in printed
    assert "pipeline_tag: fill-mask" in printed
    assert hub.log == []
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_card_written_by_hand_is_pushed_as_it_is(hub: LocalHub, push: Client, run_dir: Path):
    written = "# My model\n\nNo metadata --- and none wanted.\n"
    (run_dir / "model" / "README.md").write_text(written)
    accepted(push(run_dir, "--repo", "demo", "--dry_run"))
    accepted(push(run_dir, "--repo", "demo"))
    assert hub.files("user/demo")["README.md"].decode() == written


def test_a_busy_hub_is_asked_again(hub: LocalHub, push: Client, run_dir: Path):
    hub.faults = [Fault("POST", path, 503) for path in ("/api/repos/create", "/branch/v2", "/commit/v2")]
    done = push(run_dir, "--repo", "demo", "--revision", "v2")
    accepted(done)
    assert done.stderr.count("trying again") == 3
    assert set(hub.files("user/demo", "v2")) == MODEL
    assert hub.requests("PUT", "") == 1


def test_a_hub_that_stays_busy_is_given_up_in_one_line(hub: LocalHub, push: Client, run_dir: Path):
    hub.faults = [Fault("POST", "/commit/main", 503, times=99)]
    assert "503" in refused(push(run_dir, "--repo", "demo"))
    assert 3 <= hub.requests("POST", "/commit/main") <= 10
    assert hub.files("user/demo") == {}


def test_what_the_hub_refuses_is_one_line(hub: LocalHub, push: Client, run_dir: Path):
    hub.repos["somebody/public"] = Repo(private=False)
    for token, repo, expected in (
        ("hf_wrong", "demo", "not valid"),
        (READ, "demo", "lacks the scope `write`"),
        (None, "demo", "no Hub token"),
        ("hf_\u00e4", "demo", "not a token"),
        (WRITE, "somebody/demo", "may not write"),
        (WRITE, "somebody/public", "may not write"),
        (WRITE, "a/b/c", "owner/name"),
    ):
        option = () if token is None else ("--token", token)
        assert expected in refused(push(run_dir, "--repo", repo, *option, token=None))
    assert set(hub.repos) == {"somebody/public"}
    assert hub.files("somebody/public") == {}
    assert hub.requests("PUT", "") == 0


def test_a_private_model_is_not_there_for_others(hub: LocalHub, push: Client, client: Client, run_dir: Path):
    accepted(push(run_dir, "--repo", "demo", "--private"))
    ask = "import sys, huggingface_hub; print(sorted(huggingface_hub.list_repo_files('user/demo')))"
    assert "model.safetensors" in client("-c", ask, token=WRITE).stdout
    assert "RepositoryNotFoundError" in client("-c", ask, token=STRANGER).stderr


def test_a_hub_that_is_not_there_is_one_line(hub: LocalHub, push: Client, run_dir: Path):
    hub.stop()
    assert f"the Hub at {hub.url} cannot be reached" in refused(push(run_dir, "--repo", "demo"))
    assert "HF_HUB_OFFLINE" in refused(push(run_dir, "--repo", "demo", HF_HUB_OFFLINE="1"))


def test_what_cannot_be_pushed_is_said_before_the_hub_is_asked(
    hub: LocalHub, push: Client, run_dir: Path, tmp_path: Path
):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    next((run_dir / "sharded").glob("model-00002-*")).unlink()
    shutil.rmtree(run_dir / "model")
    (tmp_path / "empty").mkdir()
    for path, expected in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "not a model folder"),
        (run_dir, f"run `cloze consolidate {run_dir}` first"),
        (tmp_path / "pickled", "no safetensors weights"),
        (run_dir / "sharded", "model-00002-"),
    ):
        assert expected in refused(push(path, "--repo", "demo"))
    assert hub.log == []
