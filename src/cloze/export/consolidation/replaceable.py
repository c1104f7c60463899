"""Which folder consolidation may replace: only a model folder that Cloze wrote, and nothing else in it.

    check_replaceable(Path("runs/demo/model"))      # ConfigError names the first file that Cloze did not write

Cloze of older versions wrote no cloze.json, so a folder is recognised by the names of all its entries.
"""

from __future__ import annotations

import stat
from fnmatch import fnmatchcase
from pathlib import Path

from cloze.checkpoint.format import MANIFEST
from cloze.checkpoint.lineage import FILE as RECORD
from cloze.checkpoint.lineage import WEIGHT_FILES
from cloze.errors import ConfigError
from cloze.export.cards.curve import CURVE
from cloze.utils.atomic_files import disk_errors
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.paths import printable, real_path
from cloze.utils.foreign.safetensors_header import INDEX

CARD, CONFIG, NOTE = "README.md", "config.json", "grown.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "byte_maps.json",
    "normalizer.json",
    "word_shape.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "tokenizer.model",
)
_WRITTEN = (CONFIG, "generation_config.json", WEIGHT_FILES, INDEX, CARD, CURVE, RECORD, NOTE, *TOKENIZER_FILES)
_HINT = "choose another --output"


def check_replaceable(output: Path) -> None:
    """Raise ConfigError unless `output` does not exist, or is a model folder with only the files that Cloze wrote."""
    with disk_errors(output):
        folder = real_path(output)
        inside = next((one for one in folder.parents if (one / MANIFEST).is_file()), None)
        if inside is not None:
            raise ConfigError("is inside a checkpoint", where=output, hint=f"{_HINT}, outside {inside}")
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError("exists and is not a model folder", where=output, hint=_HINT)
        for entry in sorted(folder.iterdir()):
            if not _is_written(entry):
                what = f"is not a model folder that Cloze wrote: it holds {printable(entry.name)}"
                raise ConfigError(what, where=output, hint=f"{_HINT}, or move that elsewhere")
        # Older versions wrote a card and no record; another program's save_pretrained writes neither.
        if not (folder / CONFIG).is_file() or not ((folder / RECORD).is_file() or (folder / CARD).is_file()):
            missing = CONFIG if not (folder / CONFIG).is_file() else RECORD
            what = f"is not a model folder that Cloze wrote: there is no {missing}"
            raise ConfigError(what, where=output, hint=_HINT)


def _is_written(entry: Path) -> bool:
    """Return whether an entry of a folder may be a file that the writer of model folders made."""
    if not stat.S_ISREG(entry.lstat().st_mode):
        return False
    if entry.suffix == ".py":  # copied by transformers beside the configuration of a model with its own code
        return "auto_map" in read_mapping(entry.with_name(CONFIG))
    return any(fnmatchcase(entry.name, pattern) for pattern in _WRITTEN)
