"""The commands on a card: what the run did, in words that the command line takes."""

from __future__ import annotations

import dataclasses
import shlex

from cloze.config import TrainConfig
from cloze.config.parser import parse
from cloze.export.cards.reproduce import commands, launcher

DATA = {
    "block_size": 64,
    "packing": "best_fit",
    "split_special_tokens": True,
    "unit_size": 1000,
    "tokenizer": {"name": "roberta-base"},
    "source": {
        "dataset_name": "owner/eli5",
        "dataset_config_name": "en",
        "revision": "abc",
        "split": "train[:10%]",
        "text_field": "title,answers.text",
        "id_field": "q_id",
    },
    "split_rule": {"kind": "hash of the document's id", "validation_percentage": 7.5},
    "bad_records": {"null text": 1},
}


def config(**values: object) -> dict:
    return dataclasses.asdict(TrainConfig(dataset_name="/here/prepared", output_dir="/here/runs/x", **values))


def words(command: str) -> list[str]:
    """What the command line of `cloze` gets."""
    return shlex.split(command.split("cloze ", 1)[1])


def test_the_commands_are_understood_and_say_what_the_run_said():
    ours = config(
        model_type="roberta",
        config_overrides="hidden_size=32",
        learning_rate=3e-4,
        lr_scheduler_kwargs={"min_lr_ratio": 0.1},
        freeze=r".*(embeddings|layer\.0\.)",
        eval_strategy="steps",
        bf16=True,
        seed=9,
        token="hf_secret",
        hub_token="hf_secret2",
        run_name="host-17",
        push_to_hub=True,
    )
    prepare, train, push = commands(ours, DATA, [], "owner/mine")
    _, made = parse(words(prepare))
    assert (made.block_size, made.packing, made.split_special_tokens, made.unit_size) == (64, "best_fit", True, "1000")
    assert (made.dataset_name, made.dataset_config_name, made.dataset_revision) == ("owner/eli5", "en", "abc")
    assert (made.split, made.text_field, made.id_field) == ("train[:10%]", "title,answers.text", "q_id")
    assert (made.validation_split_percentage, made.on_bad_record, made.tokenizer_name) == (7.5, "skip", "roberta-base")
    _, again = parse(words(train))
    assert again.dataset_name == made.output == "prepared/mine"
    assert again.output_dir == "runs/mine"
    kept = {"dataset_name", "output_dir", "token", "hub_token", "run_name", "push_to_hub"}
    there = dataclasses.asdict(again)
    assert {name: there[name] for name in there if name not in kept} == {
        name: ours[name] for name in ours if name not in kept
    }
    for secret in ("hf_secret", "host-17", "/here"):
        assert secret not in prepare + train + push
    assert parse(words(push.split("&&")[1]))[1].repo == "owner/mine"


def test_validation_from_a_split_of_its_own_and_precision_from_the_launcher_are_said():
    named = DATA | {"split_rule": {"kind": "named", "validation": "test"}}
    prepare, train, _ = commands(config(model_type="bert"), named, [{"precision": "bf16"}], "owner/mine")
    assert parse(words(prepare))[1].validation_split == "test"
    assert parse(words(train))[1].precision == "bf16"
    asked = commands(config(model_type="bert", bf16=True), named, [{"precision": "bf16"}], "owner/mine")[1]
    assert (parse(words(asked))[1].precision, parse(words(asked))[1].bf16) == ("auto", True)


def test_a_streamed_run_has_no_prepare_and_says_its_corpus():
    streamed = config(model_type="bert", streaming_train=True, max_steps=5, tokenizer_name="bert-base-cased")
    streamed["dataset_name"] = "owner/eli5"
    train, _ = commands(streamed, DATA | {"streamed": True}, [], "owner/mine")
    _, again = parse(words(train))
    assert (again.dataset_name, again.tokenizer_name, again.streaming_train) == ("owner/eli5", "bert-base-cased", True)


def test_the_launcher_starts_as_many_ranks_of_the_same_engine():
    assert launcher([]) == "python"
    two = {"ranks": 2, "devices": {"NVIDIA H100": 2}}
    assert launcher([two | {"engine": "DDP"}]).endswith("multi_gpu.yaml --num_processes 2")
    assert launcher([{"ranks": 2, "engine": "DDP", "devices": {"AMD": 2}}]).endswith("cpu.yaml --num_processes 2")
    assert launcher([two | {"engine": "FSDP2"}]).endswith("fsdp2.yaml --num_processes 2")
    assert launcher([{"ranks": 1}, two | {"engine": "DeepSpeed ZeRO-3"}]).endswith("zero3.yaml --num_processes 2")


def test_nothing_is_said_where_the_run_says_too_little():
    assert commands({}, DATA, [], "owner/mine") == []
    assert commands(config(), {}, [], "owner/mine") == []
