"""Whatever encodes gives the tokenizer's own ids; what does not is not used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from cloze.data.tokenizers import encoders
from cloze.data.tokenizers.encoders import Encoder, EncoderSpec
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.select_encoder import NASTY_TEXTS, choose_encoder, reference, template
from cloze.errors import ConfigError, ModelError

TEXTS = ["The Milky Way is a spiral galaxy.", "", "naïve 🌌 日本語", "a <mask> b</s> <pad>[MASK] [CLS]x", "x" * 500]


def wordpiece(folder: Path):
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator([*TEXTS, *NASTY_TEXTS[:12]] * 3, vocab_size=200, show_progress=False)
    trained.save_model(str(folder))
    return BertTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def bpe(prepared: Path):
    return load_tokenizer(str(prepared.parent / "tokenizer"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory):
    return wordpiece(tmp_path_factory.mktemp("wordpiece"))


def assert_same_ids(tokenizer, spec: EncoderSpec, texts: list[str], special: bool) -> None:
    tokens, lengths = Encoder(spec)(texts)
    assert tokens.dtype == np.int32
    assert len(tokens) == lengths.sum()
    expected = reference(tokenizer, texts, special)
    assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == expected


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_a_byte_level_tokenizer_has_the_same_ids_everywhere(bpe, backend: str, special: bool):
    pytest.importorskip(backend)
    spec = choose_encoder(bpe, backend, special, TEXTS)
    assert spec.backend == backend
    assert_same_ids(bpe, spec, [*TEXTS, *NASTY_TEXTS], special)
    as_text = reference(bpe, ["<mask>"], True) != reference(bpe, ["<mask>"], False)
    assert as_text, "the flag does something"


@pytest.mark.parametrize("special", [False, True])
def test_wordpiece_goes_through_tokenizers(bert, special: bool):
    spec = choose_encoder(bert, "auto", special, TEXTS)
    assert spec.backend == "tokenizers"
    assert_same_ids(bert, spec, [*TEXTS, *NASTY_TEXTS], special)


def test_a_backend_that_cannot_encode_it_is_refused_with_the_reason(bert):
    pytest.importorskip("gigatoken")
    with pytest.raises(ConfigError, match=r"--tokenizer_backend: gigatoken cannot be used: .*; leave it out"):
        choose_encoder(bert, "gigatoken", False, TEXTS)


def test_the_fastest_is_chosen_where_it_fits_and_not_where_it_is_missing(bpe, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gigatoken")
    assert choose_encoder(bpe, "auto", False, TEXTS).backend == "gigatoken"
    monkeypatch.setattr(
        "cloze.data.tokenizers.select_encoder.find_spec", lambda name: None if name == "gigatoken" else True
    )
    assert choose_encoder(bpe, "auto", False, TEXTS).backend == "tokenizers"
    with pytest.raises(ConfigError, match=r"pip install gigatoken"):
        choose_encoder(bpe, "gigatoken", False, TEXTS)


def test_a_backend_with_other_ids_is_never_used(bpe, monkeypatch: pytest.MonkeyPatch, capsys):
    """One that errs on a single text of the corpus."""
    pytest.importorskip("gigatoken")

    def wrong(spec: EncoderSpec):
        right = encoders._tokenizers(spec)

        def encoded(texts: list[str]):
            ids, counts = right(texts)
            at = int(np.cumsum(counts)[texts.index("odd one")]) - 1
            ids[at] += 1
            return ids, counts

        return encoded

    monkeypatch.setitem(encoders.BACKENDS, "gigatoken", wrong)
    assert choose_encoder(bpe, "auto", False, [*TEXTS, "odd one"]).backend == "tokenizers"
    assert "gigatoken is not used: it gives other ids for 'odd one'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="it gives other ids for 'odd one'"):
        choose_encoder(bpe, "gigatoken", False, [*TEXTS, "odd one"])
    monkeypatch.setitem(encoders.BACKENDS, "tokenizers", wrong)
    with pytest.raises(ModelError, match="other tokens when it adds special ones"):
        choose_encoder(bpe, "auto", False, [*TEXTS, "odd one"])


def test_the_slow_way_is_right_too(bpe, prepared: Path):
    folder = str(prepared.parent / "tokenizer")
    prefix, suffix = template(bpe)
    assert (prefix, suffix) == ((0,), (2,))
    for special in (False, True):
        spec = EncoderSpec("transformers", folder, prefix, suffix, special)
        assert_same_ids(bpe, spec, [*TEXTS, *NASTY_TEXTS[:8]], special)


@pytest.mark.parametrize(("name", "backend"), [("roberta-base", "gigatoken"), ("bert-base-uncased", "tokenizers")])
def test_real_tokenizers_get_the_fastest_backend(shared_data: Path, name: str, backend: str):
    pytest.importorskip("gigatoken")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    for special in (False, True):
        assert choose_encoder(tokenizer, "auto", special, TEXTS).backend == backend


def test_special_tokens_are_found_around_the_only_letters_that_a_tokenizer_has():
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *"ACGT"]
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    assert template(tokenizer) == ((1,), (2,))
