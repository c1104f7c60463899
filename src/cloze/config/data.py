"""Where documents come from and how they become blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cloze.config.ranges import MAX_BLOCK_SIZE, MAX_COUNT, MIN_BLOCK_SIZE, SIZE, Ge, Le, Lt, Ranged


@dataclass(kw_only=True)
class SourceConfig(Ranged):
    """Where documents come from."""

    dataset_name: str | None = None
    """a dataset on the Hub (`owner/name`), or a local file, folder or glob: json (array or lines), jsonl, parquet,
    arrow, csv, tsv, txt or md (a document on each line); those of text also as .gz or .zst"""
    preset: Literal["eli5", "eli5_category", "eli5_kilt", "eli5_pairs"] | None = None
    """the fields (and, without a dataset_name, the place on the Hub) of a known corpus: `eli5` (the original records),
    `eli5_category`, `eli5_kilt` (facebook/kilt_tasks), `eli5_pairs` (sentence-transformers/eli5)"""
    document: Literal["answers", "full"] = "answers"
    """with a preset, what the text is: `answers` as in the tutorial; `full`: title and question before the answers"""
    dataset_config_name: str | None = None
    """the configuration of a Hub dataset"""
    dataset_revision: str | None = None
    """the branch, tag or commit of a Hub dataset"""
    split: str = "train"
    """which documents to take; slices as in `datasets`: `train`, `train[:5000]`, `train_asks[10%:20%]`"""
    text_field: str | None = None
    """the field with the text; dots go into nested fields, lists are joined by a space, several fields are separated
    by commas: `title,answers.text` (default: `text`, or the line of a .txt file)"""
    id_field: str | None = None
    """the field that names a document (default: `q_id` or `id` if present, else the text itself)"""
    cache_dir: str | None = None
    """where downloads from the Hub are kept"""
    token: str | None = None
    """a Hub token (default: the one of `hf auth login`)"""


@dataclass(kw_only=True)
class BlocksConfig(SourceConfig):
    """How documents become blocks of tokens."""

    block_size: Annotated[int, Ge(MIN_BLOCK_SIZE), Le(MAX_BLOCK_SIZE)] = 128
    """tokens per block"""
    packing: Literal["concat", "best_fit"] = "concat"
    """`concat`: join documents and cut full blocks, as in the tutorial; `best_fit`: keep documents whole if they fit,
    pad blocks, and restrict attention to documents"""
    tokenizer_backend: Literal["auto", "gigatoken", "tokenizers", "characters", "transformers"] = "auto"
    """what encodes the text (default: the fastest backend that gives the tokenizer's own ids)"""
    split_special_tokens: bool = False
    """encode text that spells a special token (`<mask>`) as ordinary text (default: as the special token, like
    tokenizers)"""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """what to do with a record without text, of the wrong type, that is not UTF-8, or above 64 MiB: stop and name it,
    or skip and count it"""
    num_proc: Annotated[int | None, Ge(1), Le(4096)] = None
    """worker processes; the result does not depend on their number (default: one per core)"""
    unit_size: Annotated[str, SIZE] = "32MB"
    """bytes of the corpus that are processed and saved at a time; use larger units for corpora of many terabytes"""
    validation_split: str | None = None
    """take the validation documents from this split of the dataset"""
    validation_split_percentage: Annotated[float, Ge(0), Lt(100)] = 5.0
    """without a validation_split: percentage of documents for validation, chosen by a hash of the document's id, so
    that a document is always on the same side; 0 for none"""
    trust_remote_code: bool = False
    """run Python code that comes with the tokenizer"""


@dataclass(kw_only=True)
class PrepareConfig(BlocksConfig):
    """Turn a corpus into fixed blocks of tokens, once, before any GPU is used."""

    tokenizer_name: str
    """a tokenizer on the Hub, or a local folder"""
    output: str
    """the folder to make; `datasets.load_from_disk` opens it too"""
    num_shards: Annotated[int, Ge(1), Le(MAX_COUNT)] = 1
    """divide the work among this many runs of the command, on any machines that share the output folder"""
    shard_index: Annotated[int | None, Ge(0), Lt(MAX_COUNT)] = None
    """which of them this is, from 0"""
    finalize: bool = False
    """do no work, only check that all shards' work is there and join it (the last shard does it by itself)"""


@dataclass(kw_only=True)
class InspectConfig(Ranged):
    """Show the contents of a prepared folder."""

    data: str
    """a folder made by `cloze prepare`"""
    split: str | None = None
    """train or validation (default: all there are)"""
    blocks: Annotated[int, Ge(0), Le(MAX_COUNT)] = 3
    """how many blocks to show as text"""
    verify: bool = False
    """read every shard and compare its checksum"""


@dataclass(kw_only=True)
class TokenizerConfig(SourceConfig):
    """Train a tokenizer on a corpus, or extend a pretrained one with tokens for the corpus."""

    output: str
    """the folder to make"""
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """`bpe`: byte-level, with RoBERTa's special tokens; `wordpiece`: BERT's; `unigram`: SentencePiece's, with XLM-R's
    special tokens"""
    vocab_size: Annotated[int, Ge(1), Le(10**7)] = 8192
    """number of tokens, special tokens included"""
    min_frequency: Annotated[int, Ge(0), Le(MAX_COUNT)] = 2
    """how often a pair must occur to be merged, and a word to become a token"""
    do_lower_case: bool = False
    """with wordpiece and unigram: take all letters for small ones; accents stay"""
    strip_accents: bool = False
    """with wordpiece: remove combining marks, as bert-base-uncased does; not for scripts whose vowels and tones are
    such marks (Hindi, Thai, Vietnamese, Arabic with vowels), where it makes other words"""
    model_max_length: Annotated[int, Ge(1), Le(MAX_COUNT)] = 512
    """the longest input that models with this tokenizer will take"""
    extend: str | None = None
    """a tokenizer on the Hub, or a local folder: keep all its tokens, and add those that save most on this corpus"""
    new_tokens: Annotated[int, Ge(1), Le(10**7)] = 1000
    """with extend: how many to add at most; `cloze grow` gives a model embeddings for them"""
