"""Tags, pull requests, datasets, fine-grained tokens and Xet storage, with the real client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from local_hub import LocalHub, Repo
from pushing import FINE, HOST, SCORES, STRANGER, WRITE, Client, accepted, everything, refused

from cloze.data.prepared.shards import open_prepared
from cloze.errors import ClozeError, ConfigError
from cloze.export.hub.blocks import find_blocks

PULL = """
import json, sys
from huggingface_hub import snapshot_download
from transformers import pipeline
folder = snapshot_download(sys.argv[1])
fill = [pipeline("fill-mask", name)("A whale is a <mask>.") for name in (folder, sys.argv[2])]
print(json.dumps([[(one["token_str"], one["score"]) for one in answers] for answers in fill]))
"""
LOAD = """
import json, sys
from datasets import load_dataset, load_from_disk
from huggingface_hub import snapshot_download
folder = snapshot_download("user/blocks", repo_type="dataset")
kinds = load_dataset("user/blocks"), load_from_disk(folder)
print(json.dumps([{split: kind[split]["input_ids"][:] for split in kind} for kind in kinds]))
"""


@pytest.fixture
def blocks_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, with a model to push."""
    from cloze.config import ConsolidateConfig
    from cloze.export.consolidation.consolidate import consolidate

    run = Path(shutil.copytree(trained, tmp_path / "runs" / "six"))
    consolidate(ConsolidateConfig(checkpoint=str(run)))
    return run


def test_a_tag_stands_at_the_commit_and_is_never_moved(hub: LocalHub, push: Client, run_dir: Path):
    accepted(push(run_dir, "--repo", "demo", "--tag", "v1"))
    repo = hub.repos["user/demo"]
    assert repo.tags == {"v1": repo.sha("main")}
    assert "nothing has changed" in accepted(push(run_dir, "--repo", "demo", "--tag", "v1"))
    (run_dir / "eval.json").write_text(json.dumps(SCORES | {"perplexity": 5.5}))
    assert "the tag v1 belongs to another commit" in refused(push(run_dir, "--repo", "demo", "--tag", "v1"))
    assert repo.tags["v1"] != repo.sha("main")


def test_a_pull_request_leaves_main_alone_and_is_gone_on_with(hub: LocalHub, push: Client, run_dir: Path):
    hub.repos["user/demo"] = Repo(private=False)
    before = hub.repos["user/demo"].commit("main", {"README.md": b"# Theirs\n"})
    printed = accepted(push(run_dir, "--repo", "user/demo", "--create_pr", token=STRANGER))
    assert f"{hub.url}/user/demo/discussions/1" in printed
    assert hub.repos["user/demo"].sha("main") == before
    assert "model.safetensors" in hub.files("user/demo", "refs/pr/1")
    again = accepted(push(run_dir, "--repo", "user/demo", "--create_pr", token=STRANGER))
    assert "nothing has changed" in again
    assert len(hub.repos["user/demo"].pull_requests) == 1
    assert "--create_pr: " in refused(push(run_dir, "--repo", "demo", "--create_pr", "--tag", "v1"))


def test_a_fine_grained_token_may_do_what_it_lists(hub: LocalHub, push: Client, run_dir: Path):
    accepted(push(run_dir, "--repo", "fine", token=FINE))
    line = refused(push(run_dir, "--repo", "other", token=FINE))
    assert "the token lacks the scope `repo.write` for user" in line
    assert set(hub.repos) == {"user/fine"}
    assert hub.requests("POST", "create") == 1


def test_license_and_language_get_into_the_card_and_what_the_hub_knows_of_the_base(
    hub: LocalHub, push: Client, run_dir: Path
):
    accepted(push(run_dir, "--repo", "demo"))
    assert ModelCard(hub.files("user/demo")["README.md"].decode()).data.license is None
    hub.repos["distilbert/distilroberta-base"] = Repo(private=False)
    hub.repos["distilbert/distilroberta-base"].commit("main", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    accepted(push(run_dir, "--repo", "demo", "--language", "en, de"))
    card = ModelCard(hub.files("user/demo")["README.md"].decode()).data
    assert (card.license, card.language) == ("apache-2.0", ["en", "de"])
    accepted(push(run_dir, "--repo", "demo", "--license", "mit"))
    assert ModelCard(hub.files("user/demo")["README.md"].decode()).data.license == "mit"


def test_a_card_that_holds_a_token_is_not_pushed(hub: LocalHub, push: Client, run_dir: Path):
    (run_dir / "model" / "README.md").write_text(f"# Mine\n\nlogin(token='hf_{'a1' * 17}')\n")
    assert "README.md: holds what looks like a Hugging Face token" in refused(push(run_dir, "--repo", "demo"))
    assert hub.files("user/demo") == {} if "user/demo" in hub.repos else True
    assert hub.requests("POST", "/commit/") == 0


def test_blocks_are_pushed_as_a_dataset_that_datasets_and_cloze_open(
    hub: LocalHub, push: Client, client: Client, blocks_run: Path, prepared: Path, tmp_path: Path
):
    printed = accepted(push(blocks_run, "--repo", "demo", "--dataset_repo", "blocks", "--license", "mit"))
    assert f"{hub.url}/datasets/user/blocks/commit/" in printed
    ours = open_prepared(prepared)
    expected = {name: ours.blocks(name).read(np.arange(len(ours.blocks(name)))).tolist() for name in ours.splits}
    done = client("-c", LOAD, token=None)
    loaded, from_disk = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else (done.stderr, None)
    assert loaded == expected
    assert from_disk == expected
    files = hub.files("datasets/user/blocks")
    for name, content in files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert open_prepared(tmp_path / "back").manifest == ours.manifest
    card = DatasetCard(files["README.md"].decode())
    assert (card.data.license, card.data.task_categories) == ("mit", ["fill-mask"])
    assert ours.manifest["checksum"] in card.text
    assert ModelCard(hub.files("user/demo")["README.md"].decode()).data.datasets == ["user/blocks"]
    sent = b"".join(hub.received) + everything(files) + everything(hub.files("user/demo"))
    for secret in (WRITE, str(prepared.parent), str(blocks_run.parent), f"{Path.home()}/", HOST):
        assert secret.encode() not in sent
    again = accepted(push(blocks_run, "--repo", "demo", "--dataset_repo", "blocks", "--license", "mit"))
    assert again.count("nothing has changed since") == 2


def test_blocks_that_are_not_those_of_the_run_are_refused(tmp_path: Path, trained: Path):
    for name in ("config.yaml", "data.json"):
        shutil.copy(trained / name, tmp_path)
    facts = json.loads((trained / "data.json").read_text())
    assert find_blocks(tmp_path).manifest == facts
    with pytest.raises(ConfigError, match="give the run"):
        find_blocks(None)
    for change, expected in (({"checksum": "0" * 64}, "not the data of this run"), ({"streamed": True}, "no blocks")):
        (tmp_path / "data.json").write_text(json.dumps(facts | change))
        with pytest.raises(ClozeError, match=expected):
            find_blocks(tmp_path)


def test_a_pulled_model_fills_the_mask_as_the_local_one(hub: LocalHub, push: Client, client: Client, run_dir: Path):
    accepted(push(run_dir, "--repo", "demo"))
    done = client("-c", PULL, "user/demo", run_dir / "model", token=None)
    downloaded, local = json.loads(done.stdout.splitlines()[-1])
    assert downloaded == local


def test_xet_storage_carries_a_model_there_and_back(
    hub: LocalHub, push: Client, client: Client, run_dir: Path, tmp_path: Path
):
    pytest.importorskip("hf_xet")
    hub.xet, on = tmp_path / "store", {"HF_HUB_DISABLE_XET": "0"}
    accepted(push(run_dir, "--repo", "demo", **on))
    assert len(hub.xet_hashes) == 1
    assert hub.requests("PUT", "") == 0
    commits = len(hub.repos["user/demo"].commits)
    assert "nothing has changed" in accepted(push(run_dir, "--repo", "demo", **on))
    assert len(hub.repos["user/demo"].commits) == commits
    download = "import sys, huggingface_hub; huggingface_hub.snapshot_download('user/demo', local_dir=sys.argv[1])"
    assert client("-c", download, tmp_path / "pulled", token=None, **on).returncode == 0
    assert hub.requests("GET", "xet-read-token") == 1
    for name, content in hub.files("user/demo").items():
        assert content == (tmp_path / "pulled" / name).read_bytes() == (run_dir / "model" / name).read_bytes()
