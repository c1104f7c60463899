"""Every architecture is made for the padding token that there is, or refused in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_files import digits, saved, words
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from cloze.config import ModelConfig
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import ModelError
from cloze.model.archs import ENDS_AT_PADDING, PADDED, PADDING_ID, POSITIONS_AFTER_PADDING
from cloze.model.load import read_config, usable_length

ARCHITECTURES = sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
NAMES = {"unk_token": "[UNK]", "mask_token": "[MASK]"}


def tokenizer(folder: Path, padding: str | None, padding_id: int = 90, size: int = 100):
    """Return a tokenizer with this padding token, which has this id if it is [PAD]."""
    vocabulary = {"[UNK]": 2, "[MASK]": 3, "[PAD]": padding_id}
    free = [token for token in range(size) if token not in vocabulary.values()]
    vocabulary |= {f"w{token}": token for token in free}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return load_tokenizer(saved(folder, backend, NAMES | ({"pad_token": padding} if padding else {})))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("padding")
    return {
        "first": tokenizer(place / "first", "[PAD]", 1),
        "last": tokenizer(place / "last", "[PAD]"),
        "none": tokenizer(place / "none", None),
        "unknown": tokenizer(place / "unknown", "[UNK]"),
    }


def refusal(model_type: str, kinds: dict, kind: str, **more: str) -> str | None:
    """Return the line that it is refused with; None if a configuration is made."""
    try:
        config = read_config(ModelConfig(model_type=model_type, **more), kinds[kind], 32)
    except ModelError as error:
        return str(error)
    text = config.get_text_config()
    assert text.vocab_size == 100
    if model_type in POSITIONS_AFTER_PADDING:
        assert usable_length(config) >= 32
    return None


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_is_made_for_a_padding_token_or_refused(kinds: dict, model_type: str):
    assert refusal(model_type, kinds, "first") is None
    after, fixed = model_type in POSITIONS_AFTER_PADDING, model_type in PADDING_ID
    none, last, unknown = (refusal(model_type, kinds, kind) for kind in ("none", "last", "unknown"))
    assert (none is not None) == (after or model_type in PADDED)
    assert (last is not None) == after
    assert (unknown is not None) == (after or model_type in ENDS_AT_PADDING)
    assert all("\n" not in line for line in (none, last, unknown) if line is not None)
    assert none is None or "has no padding token" in none
    assert last is None or ("in its code" if fixed else "counts positions from there: 123") in last
    assert unknown is None or ("in its code" if fixed else "padding token is also the unk_token") in unknown


def test_the_number_of_positions_may_be_chosen_by_hand(kinds: dict):
    chosen = {"config_overrides": "max_position_embeddings=123"}
    assert refusal("roberta", kinds, "last", **chosen) is None


def test_usual_tokenizers_are_taken_as_ever(tmp_path: Path, capsys):
    for make in (words, digits):
        kind = {"it": load_tokenizer(saved(tmp_path / make.__name__, *make()))}
        for model_type in ("bert", "roberta", "xlm", "modernbert"):
            config = read_config(ModelConfig(model_type=model_type), kind["it"], 32)
            assert config.pad_token_id == kind["it"].pad_token_id
    assert not capsys.readouterr().err
