"""One hostile file per promise: folders of models and tokenizers that a stranger made."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import ModelError
from cloze.model.weights import load_weights
from cloze.utils.foreign import model_size
from cloze.utils.foreign.pretrained import from_config, from_pretrained

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BertForMaskedLM(BertConfig(**TINY, max_position_embeddings=16)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        from_pretrained(AutoModelForMaskedLM, folder, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_folder_that_save_pretrained_made_is_loaded(folder: Path):
    assert from_pretrained(AutoConfig, folder).vocab_size == 20
    model = from_pretrained(AutoModelForMaskedLM, folder)
    assert sum(p.numel() for p in from_config(AutoModelForMaskedLM, model.config).parameters()) > 0


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e9},
        {"num_hidden_layers": -(10**9)},
        {"model_type": "gpt2", "n_layer": 10**9},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"max_position_embeddings": 10**9},
        {"intermediate_size": 10**9},
        {"num_labels": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"model_type": "funnel", "block_sizes": [10**9, 10**9]},
        {"model_type": "funnel", "block_repeats": [10**9]},
        {"model_type": "mpnet", "relative_attention_num_buckets": 10**9},
        {"model_type": "xlm", "n_langs": 10**9},
        {"model_type": "albert", "inner_group_num": 10**9},
        {"model_type": "longformer", "attention_window": [10**9]},
        {"model_type": "yoso", "num_hash": 10**9},
        {"rope_scaling": {"factor": 10**400}},
        {"hidden_size": 10**400},
        {"hidden_size": "large"},
        {"hidden_size": None},
        {"vocab_size": -3},
        {"model_type": ["bert"]},
        {"model_type": "\x1b]52;c;aGk=\x07"},
        {"quantization_config": 3},
    ],
)
def test_a_configuration_that_no_model_has_is_one_line_before_anything_is_built(folder: Path, values: dict[str, Any]):
    refusal(changed(folder, **values))


@pytest.mark.parametrize(
    "values",
    [{"vocab_size": 2**26, "hidden_size": 2**12}, {"num_hidden_layers": 4096, "hidden_size": 2**20}],
)
def test_allowed_numbers_whose_product_no_model_has_are_one_line_before_memory_is_taken(folder: Path, values: Any):
    assert "and its files hold" in refusal(changed(folder, **values))
    with pytest.raises(ModelError, match=r"it asks for .* parameters or more"), torch.device("meta"):
        from_config(AutoModelForMaskedLM, from_pretrained(AutoConfig, folder))


def test_a_model_with_too_many_modules_is_not_built_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_size, "MAX_MODULES", 100)
    values = {"model_type": "albert", "num_hidden_groups": 60000, "inner_group_num": 4096}
    assert "asks for more than 100 modules" in refusal(changed(folder, **values))
    assert len(torch.nn.Sequential(*(torch.nn.Identity() for _ in range(101)))) == 101, "the limit ends with the load"


def test_numbers_that_are_no_sizes_may_be_large(folder: Path):
    values = {"rope_theta": 10**11, "seed": 2**40, "num_train_tokens": 10**13, "total_params": 10**12}
    assert from_pretrained(AutoModelForMaskedLM, changed(folder, **values)).config.vocab_size == 20


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "\x00"])
def test_a_configuration_that_is_no_json_object_is_one_line(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt", "tokenizer.json"])
def test_a_link_in_a_model_folder_is_refused(folder: Path, tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    assert f"{name}: is a symbolic link" in refusal(folder)


def test_a_pipe_in_a_model_folder_does_not_hold_up_the_command(folder: Path):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "not a regular file" in refusal(folder)


def test_an_index_of_weights_names_no_files_elsewhere(folder: Path):
    index = {"weight_map": {"bert.embeddings.word_embeddings.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its folder" in refusal(folder)


def test_a_bad_header_of_weights_is_one_line(folder: Path):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors: its header" in refusal(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["someone/kernel", {"text_config": "someone/kernel"}])
def test_attention_code_of_the_hub_is_not_used_because_a_configuration_says_so(folder: Path, key: str, value: Any):
    assert "asks for attention code from the Hub" in refusal(changed(folder, **{key: value}))
    assert "asks for attention code" in refusal(changed(folder, text_config={key: value}))


def test_attention_that_the_user_asks_for_takes_the_place_of_what_the_configuration_says(folder: Path):
    changed(folder, attn_implementation="someone/kernel")
    config = from_pretrained(AutoConfig, folder, typed_attention="sdpa")
    assert config._attn_implementation is None
    model = from_pretrained(AutoModelForMaskedLM, folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformers_weights", "../secret.safetensors"),
        ("configuration_files", ["config.4.0/../../x.json"]),
        ("vocab_file", "../secret"),
    ],
)
def test_a_configuration_names_no_files_elsewhere(folder: Path, key: str, value: Any):
    (folder.parent / "secret").write_text("x")
    assert "names a file outside its folder" in refusal(changed(folder, **{key: value}))


def test_old_paths_of_the_makers_machine_in_a_tokenizers_configuration_do_no_harm(folder: Path):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_file": "/root/.cache/nowhere/tokenizer.json"}')
    assert from_pretrained(AutoConfig, folder).vocab_size == 20


@pytest.mark.parametrize("loader", [AutoConfig, AutoModelForMaskedLM, AutoTokenizer])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(folder: Path, loader: Any, monkeypatch):
    code = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    (folder / "code.py").write_text(code)
    auto_map = {"AutoConfig": "code.C", "AutoModelForMaskedLM": "code.M", "AutoTokenizer": ["code.T", None]}
    changed(folder, model_type="unknown", auto_map=auto_map)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Unknown"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    with pytest.raises(ModelError, match="read it, then give --trust_remote_code"):
        from_pretrained(loader, folder)
    assert not (folder / "ran").exists()


def test_code_for_a_known_architecture_is_not_asked_about_when_a_model_is_made(folder: Path, monkeypatch):
    config = from_pretrained(AutoConfig, folder)
    config.auto_map = {"AutoModelForMaskedLM": "someone/else--code.M"}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    assert type(from_config(AutoModelForMaskedLM, config)).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])
def test_memory_that_runs_out_is_not_the_fault_of_a_model_folder(folder: Path, error: Exception):
    """`cloze.training.engines.zero3` reports it with what to do."""

    class Loader:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise error

    with pytest.raises(type(error)):
        from_pretrained(Loader, folder)


class Evil:
    """What creates a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_in_a_model_folder_is_never_loaded(folder: Path, tmp_path: Path, beside: bool):
    torch.save({"weight": Evil(tmp_path / "mark")}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    if beside:
        load_weights(folder)
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
            load_weights(folder)
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_that_fails_on_unknown_text_is_one_line_when_it_is_loaded(tmp_path: Path):
    tokenizer = Tokenizer(WordPiece({"[MASK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]").save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match=r"cannot load the tokenizer \(.*UNK"):
        load_tokenizer(str(tmp_path))
