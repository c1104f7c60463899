"""The model card: what is in its metadata, what never gets into it, and when it is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from cloze.errors import HubError
from cloze.export.cards.metadata import CardInfo, metadata_text
from cloze.export.cards.model_card import MARKER, card_text, render_card, write_card

SCORES = {"perplexity": 6.5, "masked_accuracy": 0.61, "split": "validation", "mlm_probability": 0.15, "seed": 42}
CONFIG = {
    "model_name_or_path": "distilbert/distilroberta-base",
    "learning_rate": 2e-5,
    "num_train_epochs": 3.0,
    "output_dir": "/home/me/runs/x",
    "dataset_name": "/home/me/prepared",
    "cache_dir": "/home/me/cache",
    "deepspeed": "/home/me/zero2.json",
    "token": "hf_secret",
    "run_name": "host-17",
}
DATA = {
    "block_size": 128,
    "tokenizer": {"name": "distilbert/distilroberta-base"},
    "source": {"dataset_name": "owner/eli5", "revision": "abc", "split": "train[:5000]", "text_field": "a|b"},
    "splits": {"train": {"documents": 4000, "tokens": 900000, "blocks": 7031}},
}


def make(
    folder: Path, config: Any = None, data: Any = None, scores: Any = None, mask: Any = "<mask>"
) -> tuple[Path, Path]:
    """(model folder, run folder) with the files that are given; text is written as it is."""
    model, run = folder / "run" / "model", folder / "run"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}))
    (model / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask}))
    for name, value in (("config.yaml", config), ("data.json", data), ("eval.json", scores)):
        if value is not None:
            (run / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return model, run


def test_the_metadata_says_what_the_run_knew(tmp_path: Path):
    card = ModelCard(render_card(*make(tmp_path, CONFIG, DATA, SCORES), repo="user/demo"))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.tags == ["cloze", "fill-mask", "masked-lm"]
    assert card.data.base_model == "distilbert/distilroberta-base"
    assert card.data.datasets == ["owner/eli5"]
    assert card.data.model_name == "demo"
    assert card.data.widget == [{"text": "The Milky Way is a <mask> galaxy."}]
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["perplexity"].metric_value == 6.5
    assert found["masked_accuracy"].metric_value == 0.61
    assert found["perplexity"].dataset_type == "owner/eli5"
    assert found["perplexity"].dataset_split == "validation"
    assert found["perplexity"].metric_args == {"mlm_probability": 0.15, "seed": 42}


def test_the_body_shows_data_numbers_and_hyperparameters(tmp_path: Path):
    text = render_card(*make(tmp_path, CONFIG, DATA, SCORES), repo="user/demo")
    for line in (
        "# RobertaForMaskedLM",
        "| learning_rate | 2e-05 |",
        "| documents | 4000 |",
        r"| text | a\|b |",
        "| perplexity | 6.5 |",
        'fill = pipeline("fill-mask", "user/demo")',
        'fill("The Milky Way is a <mask> galaxy.")',
        "## Limits",
    ):
        assert line in text.splitlines()


def test_the_card_says_how_long_on_what_and_how_to_do_it_again(tmp_path: Path):
    model, run = make(tmp_path, CONFIG, DATA, SCORES)
    first = {"first_step": 0, "ranks": 1, "hosts": 1, "devices": {"AMD EPYC": 1}, "engine": "single process"}
    second = {"ranks": 8, "hosts": 2, "devices": {"NVIDIA H100": 8}, "engine": "DeepSpeed ZeRO-2", "first_step": 10}
    sessions = [first | {"precision": "fp32"}, second | {"precision": "bf16", "versions": {"torch": "2.99"}}]
    (run / "sessions.json").write_text(json.dumps({"sessions": sessions}))
    lines = [
        {"step": 10, "samples_seen": 80, "loss": 7.5, "seconds": 60.0, "tokens_per_second": 100.0},
        {"step": 10, "eval_loss": 7.0},
        {"step": 20, "samples_seen": 160, "loss": 6.5, "seconds": 20.0, "tokens_per_second": 500.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    text = write_card(model, run, "user/demo", CardInfo(license="mit", language="en,de")).read_text()
    for line in (
        "| steps | 20 |",
        "| tokens seen | 20480 |",
        "| time | 1:20 |",
        "| tokens per second | 200 |",
        "| computed on, from step 1 | 1 x AMD EPYC; 1 rank on 1 host, single process, fp32 |",
        "| computed on, from step 11 | 8 x NVIDIA H100; 8 ranks on 2 hosts, DeepSpeed ZeRO-2, bf16 |",
        "| torch | 2.99 |",
        "![Loss by optimizer step](loss.svg)",
        "num_train_epochs: 3.0",
        "cloze consolidate runs/demo && cloze push runs/demo --repo user/demo",
    ):
        assert line in text.splitlines()
    assert "accelerate launch --config_file launch/accelerate/zero2.yaml --num_processes 8 -m cloze train" in text
    assert (model / "loss.svg").read_text().startswith("<svg")
    assert (ModelCard(text).data.license, ModelCard(text).data.language) == ("mit", ["en", "de"])


def test_intervals_and_bits_per_byte_are_told_where_they_were_measured(tmp_path: Path):
    more = {"perplexity_interval": [6.1, 6.9], "bits_per_byte": 1.25, "draws": 4}
    text = render_card(*make(tmp_path, CONFIG, DATA, SCORES | more), repo="user/demo")
    assert "| perplexity | 6.5 (95 %: 6.1 to 6.9) |" in text
    assert "| bits_per_byte | 1.25 |" in text
    found = {result.metric_type: result for result in ModelCard(text).data.eval_results}
    assert found["perplexity"].metric_args["interval_95"] == [6.1, 6.9]
    assert found["bits_per_byte"].metric_args == {"mlm_probability": 0.15, "seed": 42, "draws": 4}
    assert found["perplexity"].dataset_revision == "abc"


def test_what_a_run_was_told_of_its_license_is_on_the_card(tmp_path: Path):
    model, run = make(tmp_path, CONFIG | {"license": "mit", "language": "en"}, DATA, SCORES)
    assert ModelCard(render_card(model, run)).data.license == "mit"
    assert ModelCard(render_card(model, run, info=CardInfo(license="apache-2.0"))).data.license == "apache-2.0"
    write_card(model, run)
    moved = card_text(model, None, None, CardInfo(language="de"))
    assert (ModelCard(moved).data.license, ModelCard(moved).data.language) == ("mit", ["de"])


def test_no_path_token_or_host_name_gets_into_a_card(tmp_path: Path):
    local = DATA | {"tokenizer": {"name": "/home/me/tok"}, "source": {"dataset_name": "/home/me/corpus.jsonl.gz"}}
    for number, model in enumerate(("/home/me/start", "../start", "runs/start/model", "runs/model", "~/start")):
        config = CONFIG | {"model_name_or_path": model}
        text = render_card(*make(tmp_path / str(number), config, local, SCORES))
        for secret in ("/home/me", "hf_secret", "host-17", "start", str(tmp_path)):
            assert secret not in text
        assert "corpus.jsonl.gz" in text
        assert ModelCard(text).data.datasets is None


def test_a_folder_that_exists_here_is_not_taken_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, run = make(tmp_path, {"model_name_or_path": "models/start"}, {"source": {"dataset_name": "eli5"}})
    monkeypatch.chdir(tmp_path)
    assert ModelCard(render_card(model, run)).data.base_model == "models/start"
    assert ModelCard(render_card(model, run)).data.datasets == ["eli5"]
    (tmp_path / "models" / "start").mkdir(parents=True)
    (tmp_path / "eli5").mkdir()
    assert ModelCard(render_card(model, run)).data.base_model is None
    assert ModelCard(render_card(model, run)).data.datasets is None


@pytest.mark.parametrize("name", ["mine/corpus.tsv", "mine/corpus.NDJSON", "mine/corpus.json.gz", "mine/corpus.zst"])
def test_the_name_of_a_data_file_is_no_dataset_of_the_hub(name: str, tmp_path: Path):
    assert ModelCard(render_card(*make(tmp_path, data={"source": {"dataset_name": name}}))).data.datasets is None


def test_a_local_file_of_the_manifest_is_no_dataset_of_the_hub(tmp_path: Path):
    source = {"dataset_name": "eli5", "files": [{"name": "a.jsonl"}]}
    assert ModelCard(render_card(*make(tmp_path, data={"source": source}))).data.datasets is None


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"config": "{cut", "data": "{cut", "scores": "{cut"},
        {"config": [], "data": [], "scores": []},
        {"data": {"source": None, "splits": {"train": None}, "tokenizer": None}},
        {"scores": {"perplexity": None, "masked_accuracy": "high"}},
        {"scores": '{"perplexity": NaN, "masked_accuracy": Infinity}'},
    ],
)
def test_what_is_missing_or_broken_is_left_out(tmp_path: Path, broken: dict[str, Any]):
    card = ModelCard(render_card(*make(tmp_path, **broken)))
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.eval_results is None
    assert "| None |" not in card.text
    assert ModelCard(render_card(tmp_path / "run" / "model", None)).data.library_name == "transformers"


@pytest.mark.parametrize("mask", ["[MASK]", {"content": "[MASK]", "lstrip": True}])
def test_the_example_has_the_model_s_own_mask(tmp_path: Path, mask: Any):
    card = ModelCard(render_card(*make(tmp_path, mask=mask)))
    assert card.data.widget == [{"text": "The Milky Way is a [MASK] galaxy."}]
    assert 'fill("The Milky Way is a [MASK] galaxy.")' in card.text


def test_a_card_written_by_hand_is_kept_byte_for_byte(tmp_path: Path):
    model, run = make(tmp_path, CONFIG, DATA, SCORES)
    (model / "README.md").write_bytes(b"# Mine\r\n\xff\r\n")
    assert write_card(model, run) == model / "README.md"
    assert (model / "README.md").read_bytes() == b"# Mine\r\n\xff\r\n"


def test_a_card_of_ours_follows_the_run(tmp_path: Path):
    model, run = make(tmp_path, CONFIG, DATA)
    assert MARKER in write_card(model, run).read_text()
    assert ModelCard.load(model / "README.md").data.eval_results is None
    (run / "eval.json").write_text(json.dumps(SCORES))
    assert len(ModelCard.load(write_card(model, run)).data.eval_results) == 2


def test_a_model_moved_away_from_its_run_keeps_what_its_card_says(tmp_path: Path):
    model, run = make(tmp_path, CONFIG, DATA, SCORES)
    before = write_card(model, run).read_text()
    assert write_card(model, None).read_text() == before
    named = card_text(model, None, "user/moved")
    assert 'pipeline("fill-mask", "user/moved")' in named
    assert ModelCard(named).data.eval_results == ModelCard(before).data.eval_results


def test_metadata_that_is_not_yaml_is_one_line():
    assert yaml.safe_load(metadata_text("---\na: 1\n---\n# Text\n\n---\n")) == {"a": 1}
    assert metadata_text("# Text --- more --- text") == ""
    for broken in ("---\na: [1\n---\n", "---\njust words\n---\n"):
        with pytest.raises(HubError, match="not YAML"):
            metadata_text(broken)
