"""What was found in the text of a corpus is counted right, whoever did the work, and stands where people look."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cloze.cli.commands.prepare import run
from cloze.config import InspectConfig, PrepareConfig, TokenizerConfig
from cloze.data.batches.word_boundaries import mean_word_length, words_of
from cloze.data.prepare import text_sketch
from cloze.data.prepare.text_sketch import HashCounts, TextSketch, measure_sample, merge_samples
from cloze.data.prepared.shards import open_prepared
from cloze.data.prepared.text_report import report_lines, warnings_of
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.tools.inspect.prepared import inspect_prepared
from cloze.tools.report.sections import _data_facts

WORDS = ["the", "river", "stone", "garden", "letter", "winter", "market", "ladder", "naïve"]


def tokenizer_of(words: list[str], lower: bool = False) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of these words, with BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({f"##{letter}" for word in words for letter in word})
    vocabulary = {word: number for number, word in enumerate([*special, *words, *letters])}
    own = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer(lowercase=lower)
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece()
    own.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=own, **names)


def test_the_share_of_repeated_documents_holds_in_bounded_memory(monkeypatch: pytest.MonkeyPatch):
    counts = HashCounts()
    rng = np.random.default_rng(0)
    once = rng.integers(0, 2**64, 60_000, np.uint64)
    for part in np.array_split(np.concatenate([once, once[:20_000]]), 7):
        counts.add("train", part)
    counts.add("validation", np.concatenate([once[:500], rng.integers(0, 2**64, 1500, np.uint64)]))
    assert counts.repeated("train") == 0.25
    assert counts.validation_in_train() == 0.25
    monkeypatch.setattr(text_sketch, "MAX_HASHES", 10_000)
    counts.add("train", np.empty(0, np.uint64))
    assert sum(map(len, counts._kept["train"])) <= 10_000
    assert abs(counts.repeated("train") - 0.25) < 0.03
    assert abs(counts.validation_in_train() - 0.25) < 0.1


def test_the_sample_does_not_depend_on_the_units():
    texts = [f"text {number % 700}" for number in range(1000)]
    whole = TextSketch()
    parts = [TextSketch() for _ in range(3)]
    for number, text in enumerate(texts):
        whole.add(text)
        parts[number % 3].add(text)
    assert len(whole.sample) == text_sketch.SAMPLED
    assert merge_samples([whole.sample]) == merge_samples(part.sample for part in parts)
    assert len(set(merge_samples([whole.sample]))) == text_sketch.SAMPLED
    assert sorted(np.concatenate([part.hashes for part in parts])) == sorted(whole.hashes)


@pytest.mark.parametrize(
    ("lower", "text", "lost"),
    [
        (False, "the river", 0.0),
        (True, "The RIVER", 0.0),
        (False, "the naïve river", 0.0),
        (True, "the naive naïve", 1 / 14),  # the dots of ï, a character of its own in NFKD
        (False, "the \u0000\u0001river", 2 / 10),
        (False, "the ไทย", 3 / 6),
    ],
)
def test_characters_are_lost_when_decoding_does_not_give_them_back(lower: bool, text: str, lost: float):
    tokenizer = tokenizer_of([*WORDS, "naive"], lower)
    assert measure_sample([text], tokenizer)["lost_characters"] == pytest.approx(lost, abs=1e-6)


def test_a_byte_level_tokenizer_without_a_decoder_loses_nothing():
    own = Tokenizer(models.BPE({character: n for n, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.add_special_tokens(["<mask>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, mask_token="<mask>")
    assert measure_sample(["naïve ไทย 🌌"], tokenizer)["lost_characters"] == 0.0


def test_text_that_spells_special_tokens_is_kept_if_these_are_split():
    own = Tokenizer(models.BPE({character: n for n, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(["<mask>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, mask_token="<mask>")
    assert measure_sample(["a <mask> b"], tokenizer)["lost_characters"] == 0.75
    assert measure_sample(["a <mask> b"], tokenizer, split_special_tokens=True)["lost_characters"] == 0.0
    assert "--split_special_tokens" in warnings_of({"train": {"lost_characters": 0.75}})[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with everything that is warned of."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer_of(WORDS).save_pretrained(folder / "tokenizer")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[:8], 20)) for _ in range(80)]
    texts += [texts[0]] * 20 + [""] * 20 + ["河山灯窗花园信壶港冬天"] * 5
    (folder / "corpus" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "corpus" / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    for name, processes in (("corpus/one", 1), ("corpus/two", 2)):
        run(
            PrepareConfig(
                dataset_name=str(folder / "corpus"),
                validation_split="validation",
                tokenizer_name=str(folder / "tokenizer"),
                output=str(folder / name),
                block_size=16,
                unit_size="2KB",
                num_proc=processes,
            )
        )
    return folder / "corpus" / "one"


def test_prepare_reports_what_it_read(prepared: Path, capsys: pytest.CaptureFixture[str]):
    manifest = open_prepared(prepared).manifest
    assert manifest["text_report"] == open_prepared(prepared.with_name("two")).manifest["text_report"]
    train, validation = manifest["text_report"]["train"], manifest["text_report"]["validation"]
    assert (train["files"], train["documents"], validation["documents"]) == (1, 125, 40)
    assert train["empty_documents"] == round(20 / 125, 6)
    assert train["repeated_documents"] == round(24 / 105, 6)
    assert train["unknown_tokens"] == round(5 * 11 / (100 * 20 + 5 * 11), 6)
    assert validation["unknown_tokens"] == validation["lost_characters"] == 0.0
    assert 0.001 < train["lost_characters"] < 0.003
    assert validation["word"] == {"tokens": 1.0, "characters": pytest.approx(4.9, abs=0.8)}
    assert manifest["text_report"]["validation_in_train"] == 1.0
    inspect_prepared(InspectConfig(data=str(prepared), blocks=0))
    said = capsys.readouterr()
    assert "train: 1 file, 2.7 % unknown tokens" in said.out
    assert "train: 22.9 % of the documents repeat another one; was a file copied" in said.err
    assert "100.0 % of the validation documents are training documents, too" in said.err
    shown = _data_facts(manifest)
    assert "2.7 % unknown tokens" in shown["text, train"]
    assert "16.0 % of the documents are empty" in shown["warning"]


def test_a_folder_of_an_older_version_has_no_report(prepared: Path):
    assert report_lines({}) == {}
    assert warnings_of({}) == []
    assert _data_facts({})["warning"] is None


def test_a_word_that_is_a_sentence_is_warned_of():
    thai = "แม่น้ำภูเขาตะเกียงหน้าต่าง"
    report = {"train": measure_sample([f"{thai} {thai}"], tokenizer_of([thai]))}
    assert any("--mask_unit word and span would mask whole sentences" in line for line in warnings_of(report))
    report = {"train": measure_sample(["the river"], tokenizer_of(WORDS))}
    assert warnings_of(report) == []


def test_the_length_of_a_word_is_the_one_that_training_reports():
    tokenizer = tokenizer_of(WORDS)
    ids = np.array([tokenizer("the riverer")["input_ids"]], np.int32)  # the | river ##e ##r
    length = mean_word_length(words_of(tokenizer), ids, tokenizer.all_special_ids)
    assert length == 2.5
    assert measure_sample(["the riverer", "riverer the"], tokenizer)["word"] == {"tokens": length, "characters": 6.25}


def test_unknown_tokens_of_wordpiece_are_explained_by_its_longest_word(tmp_path: Path, capsys):
    letters = np.random.default_rng(0).choice(list("ACGT"), (20, 150))
    (tmp_path / "dna.txt").write_text("".join(f"{''.join(word)}\n" for word in letters))
    for kind in ("wordpiece", "bpe"):
        train_tokenizer(
            TokenizerConfig(
                dataset_name=str(tmp_path / "dna.txt"), output=str(tmp_path / kind), kind=kind, vocab_size=270
            )
        )
    said = capsys.readouterr().err
    assert said.count("100.0 % of the tokens are unknown to the tokenizer; words above max_input_chars_per_word") == 1
    report = {"train": {"unknown_tokens": 0.3, "long_words": 0.01}}
    assert warnings_of(report)[0].endswith("another tokenizer fits this text better")
    report["train"]["long_words"] = 0.2
    assert "max_input_chars_per_word" in warnings_of(report)[0]
