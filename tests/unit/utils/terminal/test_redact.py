"""No secret is shown, stored, or pushed, whatever its shape."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cloze.cli import main
from cloze.config import PushConfig, TrainConfig
from cloze.errors import ConfigError, HubError
from cloze.export.hub.publish import refuse_tokens
from cloze.utils.terminal import console, library_output
from cloze.utils.terminal.redact import redacted, secret_in

# In pieces, so that no scanner takes them for real ones.
SECRETS = {
    "a Hugging Face token": "hf_" + "Ab3" * 12,
    "an organisation's token": "api_org_" + "Ab3" * 12,
    "a GitHub token": "ghp_" + "Ab3" * 12,
    "a fine-grained GitHub token": "github_pat_" + "11AB_" * 10,
    "a GitLab token": "glpat-" + "x7Yz-" * 5,
    "an AWS key": "AKIA" + "Q7" * 8,
    "an OpenAI key": "sk-" + "proj-" + "a1B2" * 8,
    "a Google key": "AIza" + "Sy3Db" * 7,
    "a W&B key": "WANDB_API_KEY=" + "0f" * 20,
    "a new W&B key": "wandb_v1_" + "a1B2" * 8,
    "a Slack token": "xox" + "b-12345678901-abc",
    "a web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "a private key": "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
    "a password": "https://me:pa55word" + "@host/corpus.jsonl",
}
HARMLESS = [
    "the revision 1d54c5c2c2f6b5a8d8e2f0a1b2c3d4e5f6a7b8c9",
    "sha256 " + "0f" * 32,
    "https://huggingface.co/datasets/a/b@main",
    "ssh://git@github.com/a/b",
    "hf_hub_download and hf_transfer",
    "risk-management-and-other-long-words-with-dashes",
    "sk-learn-is-a-library-with-a-long-name",
    '{"mask_token": "<|some long mask token|>", "eos_token": "</s>"}',
    "xoxo-hugs",
    "a:b@c and 12:30@noon",
]


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_seen_by_its_shape(kind: str):
    secret = SECRETS[kind]
    for text in (secret, f"x {secret} y", json.dumps({"a": [secret.split("\n")[0]]}), f"'{secret}'"):
        assert secret_in(text) is not None
        assert secret_in(text.encode()) is not None
        assert secret.split("\n")[0].split("=")[-1].split("://")[-1].split("@")[0] not in redacted(text)
    assert redacted("x " * 1000 + secret).endswith(("***", "***@host/corpus.jsonl"))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str):
    assert secret_in(text) is None
    assert redacted(text) == text


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["run_name", "dataset_name", "output_dir", "project", "config_overrides"])
def test_an_option_that_is_stored_takes_no_secret(kind: str, name: str):
    with pytest.raises(ConfigError, match=f"--{name}: holds what looks like a") as error:
        TrainConfig(**{"dataset_name": "x", "output_dir": "y", name: SECRETS[kind]})  # type: ignore[arg-type]
    assert secret_in(str(error.value)) is None


@pytest.mark.parametrize("kind", SECRETS)
def test_no_secret_is_shown_by_any_way_to_the_terminal(kind: str, capsys: pytest.CaptureFixture[str]):
    secret = SECRETS[kind]
    for write in (console.show, console.show_coloured, console.warn, console.complain):
        write(f"cannot open {secret}")
    console.say("train", secret)
    main_code = None
    try:
        main(["fill", f"--model={secret}", "--wrong", secret])
    except SystemExit as end:
        main_code = end.code
    assert main_code == 2
    shown = "".join(capsys.readouterr())
    assert "***" in shown
    assert secret_in(shown) is None


def test_a_token_of_any_shape_that_was_given_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cloze.utils.terminal.redact._known", set())
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    PushConfig(path="runs/x", repo="me/x", token="no-known-shape-at-all")
    console.show("Bearer no-known-shape-at-all, correct horse battery")
    logging.setLogRecordFactory(library_output._Record)
    try:
        record = logging.getLogger("x").makeRecord("x", 30, "f", 1, "sent %s", ("no-known-shape-at-all",), None)
        assert record.getMessage() == "sent ***"
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    assert capsys.readouterr().out == "Bearer ***, ***\n"


@pytest.mark.parametrize("kind", SECRETS)
def test_no_file_with_a_secret_is_pushed(tmp_path: Path, kind: str):
    (tmp_path / "README.md").write_text("words " * 300_000 + SECRETS[kind])
    with pytest.raises(HubError, match=r"README.md: holds what looks like a") as error:
        refuse_tokens({"README.md": tmp_path / "README.md"})
    assert secret_in(str(error.value)) is None
    refuse_tokens({"model.safetensors": tmp_path / "README.md", "x.json": b'{"mask_token": "<|mask|>"}'})
