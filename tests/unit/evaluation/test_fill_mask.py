"""`cloze fill` gives what transformers' own pipeline gives, and one line for what it cannot fill."""

from __future__ import annotations

import html
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM, pipeline

from cloze.cli import main
from cloze.errors import ClozeError
from cloze.evaluation.fill_mask import fill
from cloze.tools.report.examples import fill_prompts
from cloze.tools.report.gather import gather_runs
from cloze.tools.report.page import render


@pytest.fixture(scope="module")
def model(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a run's folder."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer", model_max_length=62)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), initializer_range=0.5, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(folder / "model")
    return folder


def test_answers_are_those_of_the_pipeline(model: Path):
    text = "The Milky Way is a <mask> galaxy."
    theirs = pipeline("fill-mask", str(model / "model"))(text, top_k=5)
    (ours,) = fill(str(model), text, 5)
    assert [word for word, _ in ours] == [answer["token_str"].strip() for answer in theirs]
    assert [p for _, p in ours] == pytest.approx([answer["score"] for answer in theirs], rel=1e-5)


def test_both_spellings_of_the_mask_and_several_masks_are_understood(model: Path):
    assert fill(str(model), "a [MASK] b", 3) == fill(str(model / "model"), "a <mask> b", 3)
    assert len(fill(str(model), "<mask> and [MASK]", 2)) == 2


def test_the_command_prints_the_filled_text(model: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        main(["fill", str(model), "one <mask> two", "--top_k", "4"])
    assert not leaving.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    (answers,) = fill(str(model), "one <mask> two", 4)
    for line, (word, _) in zip(lines, answers, strict=True):
        assert f"one {word} two".rstrip() in line


@pytest.mark.parametrize(
    ("name", "text", "top_k", "expected"),
    [
        ("run", "no mask here", 3, "nothing to fill"),
        ("run", "<mask> " * 100, 3, "the model takes 62"),
        ("./nowhere", "<mask>", 3, "no such folder"),
        ("unfinished", "<mask>", 3, "cloze consolidate"),
        ("empty", "<mask>", 3, "not a model folder"),
    ],
)
def test_what_cannot_be_filled(model: Path, tmp_path: Path, name: str, text: str, top_k: int, expected: str):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "empty").mkdir()
    folder = {"run": model, "unfinished": tmp_path / "unfinished", "empty": tmp_path / "empty"}.get(name, name)
    with pytest.raises(ClozeError) as caught:
        fill(str(folder), text, top_k)
    assert expected in str(caught.value)


def test_a_report_shows_masks_filled_before_and_after(model: Path, tmp_path: Path):
    start, run = tmp_path / "start", tmp_path / "mine"
    shutil.copytree(model / "model", start / "model")
    shutil.copytree(model, run)
    torch.manual_seed(1)
    RobertaForMaskedLM(RobertaConfig.from_pretrained(model / "model")).save_pretrained(start / "model")
    (run / "config.yaml").write_text(f"model_name_or_path: {start / 'model'}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    runs, texts = gather_runs([str(run)]), ["a <mask> b", "<mask> and <mask>"]
    one, two = fill_prompts(runs, texts)
    assert (one["text"], one["run"], one["before"][0]) == ("a <mask> b", "mine", "the weights it began with")
    assert one["before"][1] == fill(str(start), "a <mask> b", 3)[0]
    assert one["after"] == fill(str(run), "a <mask> b", 3)[0]
    assert two["after"] == [words[0] for words in fill(str(run), texts[1], 1)]
    assert one["before"][1] != one["after"]
    page = render(runs, [one, two])
    word, probability = one["after"][0]
    assert f"<b>{html.escape(word)}</b> {100 * probability:.1f} %" in page
    assert str(tmp_path) not in page
    (run / "config.yaml").unlink()
    assert [each["before"] for each in fill_prompts(gather_runs([str(run)]), texts)] == [None, None]
