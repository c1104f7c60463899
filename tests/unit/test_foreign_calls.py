"""Files that this process did not write are opened and parsed by cloze.foreign only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloze

PACKAGE = Path(cloze.__file__).parent
PARSERS = {
    "json": {"load", "loads"},
    "orjson": {"loads"},
    "yaml": {"load", "safe_load", "load_all", "safe_load_all", "full_load", "unsafe_load", "compose", "parse", "scan"},
    "pickle": {"load", "loads", "Unpickler"},
    "torch": {"load"},
    "np": {"load", "fromfile", "loadtxt", "genfromtxt"},
    "numpy": {"load", "fromfile", "loadtxt", "genfromtxt"},
    "gzip": {"open"},
    "tarfile": {"open"},
    "zipfile": {"ZipFile"},
    "datasets": {"load_dataset", "load_dataset_builder", "load_from_disk"},
    "safetensors": {"safe_open"},
    "shutil": {"unpack_archive"},
}
NAMES = {
    "safe_open",
    "load_file",
    "open_file",
    "open_stream",
    "ParquetFile",
    "read_table",
    "memory_map",
    "unpack_archive",
}
METHODS = {"read_text", "read_bytes", "open", "from_pretrained", "from_config"}
CORPUS = "the corpus, which the rules of its format are applied to here"
OWN = "written by this command or its own processes"
RANKS = "a message of a process of this run, which has proved who it is"
PIPE = "a message of a process that this one started"
# Who opens or parses something itself, and why.
ALLOWED = {
    "model/mapped.py": "/proc",
    "machine.py": "/proc",
    "memory.py": "/proc",
    "launcher.py": "/proc",
    "distributed.py": "/proc",
    "train/owner_file.py": "/proc, and the owner's file, which it opens without following links",
    "train/run_owner.py": "the owner's file, which it opens without following links",
    "options/fields.py": "the source of the package",
    "report/page.py": "a file of the package",
    "sample/phrasing.py": "a file of the package",
    "commands/init.py": "files of the package",
    "collectives.py": RANKS,
    "train/link.py": RANKS,
    "hub/pusher.py": PIPE,
    "hub/follow.py": PIPE,
    "doctor/folder.py": OWN,
    "train/stacks.py": OWN,
    "train/metrics.py": OWN,
    "data/shards.py": OWN,
    "files.py": "checksums of files that were checked to be regular",
    "data/content.py": CORPUS,
    "data/lines.py": CORPUS,
    "data/readers.py": CORPUS,
    "data/local_files.py": CORPUS,
    "data/hub_source.py": "a dataset of the Hub: datasets 4 and later run no code of it",
    "data/blocks.py": "blocks, whose sizes and checksums the manifest has",
    "data/units.py": OWN,
    "data/encode.py": "the description that a tokenizer in memory gives of itself",
    "train/identity.py": "its own values, as JSON would give them back",
    "train/same_on_ranks.py": "its own values; checksums of files that are compared",
}


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each call that opens a file for reading or parses one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            reads = function.id == "open" and not _writes(node, 1)
            if reads or function.id in NAMES:
                yield node.lineno, ast.unparse(node)
        elif isinstance(function, ast.Attribute):
            owner = ast.unparse(function.value).split(".")[-1]
            if function.attr in PARSERS.get(owner, ()) or function.attr in NAMES:
                if not _is_own_text(node):
                    yield node.lineno, ast.unparse(node)
            elif function.attr in METHODS and owner != "os" and not (function.attr == "open" and _writes(node, 0)):
                yield node.lineno, ast.unparse(node)


def _writes(node: ast.Call, place: int) -> bool:
    """Whether the mode of `open` is one of writing."""
    given = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] or node.args[place : place + 1]
    return bool(given) and isinstance(given[0], ast.Constant) and set(str(given[0].value)) & set("wax") != set()


def _is_own_text(node: ast.Call) -> bool:
    """Whether what is parsed is the description that a tokenizer in memory gives of itself."""
    return bool(node.args) and ast.unparse(node.args[0]).endswith(".to_str()")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_the_package_for_them_reads_files_of_others(path: Path):
    name = path.relative_to(PACKAGE).as_posix()
    if name.startswith(("foreign/", "bench/")) or name in ALLOWED:
        return
    found = [f"{name}:{line}: {text}" for line, text in calls(path) if "streamed.open" not in text]
    assert not found, "use cloze.foreign (read_json, read_yaml, open_regular, from_pretrained, ...)"


def test_what_is_allowed_is_there():
    assert [name for name in ALLOWED if not (PACKAGE / name).is_file()] == []


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "open('x', 'rb')",
        "open('x', mode='r+')",
        "Path('x').open()",
        "p.read_text()",
        "p.read_bytes()",
        "json.loads(x)",
        "json.load(f)",
        "orjson.loads(x)",
        "yaml.safe_load(x)",
        "yaml.load(x, Loader=L)",
        "pickle.loads(x)",
        "torch.load(f)",
        "safe_open(f)",
        "load_file(f)",
        "pyarrow.ipc.open_stream(f)",
        "pyarrow.parquet.ParquetFile(f)",
        "AutoModel.from_pretrained(x)",
        "AutoModel.from_config(x)",
        "np.load(f)",
        "gzip.open(f)",
    ],
)
def test_a_call_that_reads_is_seen(tmp_path: Path, text: str):
    (tmp_path / "x.py").write_text(text)
    assert [found for _, found in calls(tmp_path / "x.py")] == [ast.unparse(ast.parse(text).body[0])]


@pytest.mark.parametrize(
    "text", ["open('x', 'w')", "open('x', mode='xb')", "p.open('a')", "json.loads(b.to_str())", "os.open(p, 0)"]
)
def test_a_call_that_writes_or_reads_nothing_of_others_is_none(tmp_path: Path, text: str):
    (tmp_path / "x.py").write_text(text)
    assert list(calls(tmp_path / "x.py")) == []
