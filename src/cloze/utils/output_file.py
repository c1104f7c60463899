"""The file that a command writes its result to, as the user names it: `--output`, `--json`.

file = check_output_file("results.json")      # before any work; DiskError for a device, a folder, config.json
write_json(file, values)
"""

from __future__ import annotations

import contextlib
import os
from fnmatch import fnmatchcase
from pathlib import Path

from cloze.errors import DiskError
from cloze.utils import run_files
from cloze.utils.atomic_files import check_writable

# Files of model, checkpoint, run and prepared folders, which a result must not replace.
_KEPT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.arrow", "*.jinja", "*.model", "*.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json", "cloze.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "grown.json", "README.md", "*.py", "*.yaml", "*.yml"),
    *(run_files.CHECKPOINT, run_files.IDENTITY, run_files.DATA, run_files.METRICS, run_files.SESSIONS),
    *(run_files.STATUS, run_files.TRACKERS, run_files.EXCLUDED_STEPS),
    *("manifest.json", "dataset_dict.json", "dataset_info.json", "state.json"),
)


def check_output_file(path: Path | str, hint: str = "choose another --output") -> Path:
    """Return the file to write for a `path` that the user gave: the target, if it is a link. Raises DiskError if it
    cannot be written, exists and is not a regular file, is where stdout or stderr goes, or is a file of a model, a run
    or a prepared folder."""
    file = Path(os.path.realpath(path))
    if file.is_dir():
        raise DiskError("is a folder, not a file", where=path, hint=hint)
    if _is_standard_stream(path):
        what = "receives this command's own output, which a file would replace"
        raise DiskError(what, where=path, hint=f"leave the option out, or {hint}")
    if os.path.lexists(file) and not file.is_file():  # a device, a pipe, a socket, a link in a circle
        raise DiskError("is not a regular file, and would be replaced by one", where=path, hint=hint)
    if Path(path).is_symlink() and not file.exists():
        raise DiskError(f"is a link to {file}, which does not exist", where=path, hint=f"remove the link, or {hint}")
    if file.exists() and any(fnmatchcase(file.name, pattern) for pattern in _KEPT):
        raise DiskError("is there already, and may be a file of a model, a run or its data", where=path, hint=hint)
    if not file.parent.is_dir() and not file.parent.exists():
        raise DiskError(f"the folder {Path(path).parent} does not exist", where=path, hint=f"create it, or {hint}")
    check_writable(file, hint)
    return file


def _is_standard_stream(path: Path | str) -> bool:
    """Return whether a path is what stdin, stdout or stderr of this process is, a device or a file."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return True
    return False
