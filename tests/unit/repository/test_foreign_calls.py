"""Files that this process did not write are opened, parsed and executed by cloze.utils.foreign only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from call_sites import call_sites, dotted

import cloze

PACKAGE = Path(cloze.__file__).parent
# What opens, maps, parses, unpickles or executes, by module. "*": everything in it.
READERS = {
    "json": {"load", "loads", "JSONDecoder"},
    "orjson": {"loads"},
    "yaml": {"load", "safe_load", "load_all", "safe_load_all", "full_load", "unsafe_load", "compose", "parse", "scan"},
    "pickle": {"load", "loads", "Unpickler", "_Unpickler"},
    "marshal": "*",
    "shelve": "*",
    "dill": "*",
    "cloudpickle": "*",
    "joblib": "*",
    "torch": {"load", "jit", "hub", "from_file"},
    "numpy": {"load", "fromfile", "loadtxt", "genfromtxt", "memmap"},
    "builtins": {"open", "eval", "exec", "compile", "__import__"},
    "io": {"open", "open_code", "FileIO"},
    "os": {"open", "fdopen", "system", "popen", "execv", "execve", "execvp", "posix_spawn"},
    "mmap": {"mmap"},
    "gzip": "*",
    "bz2": "*",
    "lzma": "*",
    "zlib": "*",
    "zipfile": "*",
    "tarfile": "*",
    "zstandard": {"open", "ZstdDecompressor", "decompress"},
    "shutil": {"unpack_archive"},
    "csv": {"reader", "DictReader"},
    "tomllib": "*",
    "configparser": "*",
    "sqlite3": "*",
    "linecache": "*",
    "fileinput": "*",
    "xml": "*",
    "importlib": {"import_module", "spec_from_file_location", "SourceFileLoader", "reload"},
    "runpy": "*",
    "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput"},
    "urllib": {"urlopen", "urlretrieve"},
    "requests": "*",
    "pyarrow": {
        "memory_map", "OSFile", "input_stream", "open_stream", "open_file", "ParquetFile", "ParquetDataset",
        "read_table", "read_schema", "read_metadata", "read_csv", "open_csv", "read_json", "open_json", "read_feather",
        "dataset", "RecordBatchStreamReader", "RecordBatchFileReader", "MemoryMappedFile", "MessageReader",
    },
    "pandas": "*",
    "datasets": {"load_dataset", "load_dataset_builder", "load_from_disk", "Dataset"},
    "safetensors": {"safe_open", "load_file", "load_model", "load", "deserialize"},
    "tokenizers": {"from_file", "from_pretrained", "from_str", "from_buffer"},
    "transformers": {"load_state_dict", "get_class_from_dynamic_module", "pipeline"},
}  # fmt: skip
# The same as methods of objects whose class is not known here.
METHODS = {
    "read_text",
    "read_bytes",
    "open",
    "from_pretrained",
    "from_config",
    "from_file",
    "load_from_disk",
    "memmap",
}

CORPUS = "the corpus, which the rules of its format are applied to here"
OWN = "written by this command or its own processes"
RANKS = "a message of a process of this run, which has proved who it is"
PIPE = "a message of a process that this one started"
PROC = "/proc and cgroups"
TOKENIZER = "the description that a tokenizer in memory gives of itself"
START = "starts a program of the system or of the package, without a shell"
BENCH = "a measurement on files and processes of its own"
LOCK = "a lock or an owner's file, without following links"
# Functions that open, parse or start something themselves, and why.
ALLOWED = {
    "__init__.py:__getattr__": "a module of the package",
    "cli/command_line.py:_run_command": "a command, which the parser knows",
    "cli/commands/bench.py:run": "a module of the package, which the parser knows",
    "tools/bench/worker_pipe.py:_cpu_seconds": PROC,
    "tools/bench/worker_pipe.py:wait": PIPE,
    "tools/bench/engine_memory.py:": PIPE,
    "tools/bench/engine_memory.py:measure": BENCH,
    "tools/bench/loader.py:bench_loader": BENCH,
    "tools/bench/loader.py:forget": BENCH,
    "tools/bench/memory.py:run_ranks": BENCH,
    "tools/bench/peers.py:": PIPE,
    "tools/bench/prepare.py:_tutorial_seconds": BENCH,
    "tools/bench/save.py:make_engine": BENCH,
    "tools/bench/sizes.py:empty_model": BENCH,
    "tools/bench/train.py:gpu_facts": PROC,
    "tools/bench/interleave.py:__enter__": BENCH,
    "tools/bench/interleave.py:run": PIPE,
    "cli/command_line.py:is_reader_gone": "/dev/null",
    "cli/command_line.py:_code_of_output": "/dev/null",
    "distributed/collectives.py:decode": RANKS,
    "tools/launch/slurm_chain.py:submit": START,
    "data/prepared/blocks.py:open_shard": "blocks, whose sizes and checksums the manifest has",
    "data/corpus/content.py:digest": "a checksum of the corpus",
    "data/corpus/content.py:_part_digest": "a checksum of the corpus",
    "data/tokenizers/encoders.py:_gigatoken": TOKENIZER,
    "data/tokenizer_training/extend.py:_backend": TOKENIZER,
    "data/tokenizer_training/extend.py:extend_tokenizer": TOKENIZER,
    "data/corpus/csv_rows.py:read_rows": CORPUS,
    "data/tokenizers/encoders.py:_tokenizers": TOKENIZER,
    "data/corpus/hub.py:_builder": "a dataset of the Hub: datasets 4 and later run no code of it",
    "data/corpus/json_array.py:read_array": CORPUS,
    "data/corpus/json_shape.py:": CORPUS,
    "data/corpus/json_shape.py:warn_of_repeated_names": CORPUS,
    "data/prepared/shards.py:_write_batch": "writes a file",
    "data/prepare/text_sketch.py:_coder": TOKENIZER,
    "tools/doctor/folder.py:measure_disk": OWN,
    "data/train_data.py:first_blocks": "not a file: a stream of blocks",
    "data/train_data.py:step_builder": "not a file: a stream of blocks",
    "data/corpus/jsonl.py:parse_line": CORPUS,
    "data/corpus/jsonl.py:_parse_slowly": CORPUS,
    "utils/file_locks.py:try_lock": LOCK,
    "data/corpus/unpack.py:open_binary": CORPUS,
    "data/corpus/readers.py:place_of": CORPUS,
    "data/prepared/shards.py:describe_split": OWN,
    "data/tokenizers/token_ids.py:unknown_id": TOKENIZER,
    "data/tokenizers/load.py:fingerprint": TOKENIZER,
    "data/corpus/unpack.py:_unpacked": CORPUS,
    "data/corpus/unpack.py:packed_as": CORPUS,
    "data/batches/word_boundaries.py:words_of": TOKENIZER,
    "data/prepare/unit.py:read_hashes": OWN,
    "data/prepare/unit.py:read_tail": OWN,
    "tools/demo/run_demo.py:call": START,
    "distributed/launch_check.py:_ancestors": PROC,
    "tools/doctor/facts.py:_output": START,
    "tools/doctor/facts.py:_silent": "/dev/null",
    "tools/doctor/folder.py:_read": OWN,
    "tools/doctor/this_process.py:first_host": START,
    "evaluation/vocabulary.py:_is_byte_level": TOKENIZER,
    "distributed/resilience/error_records.py:claim": "creates a file",
    "utils/atomic_files.py:append_text": "appends to a file",
    "utils/atomic_files.py:sha256": "checksums of files that were checked to be regular",
    "utils/atomic_files.py:sync": "makes a file of its own durable",
    "tools/grow/vocabulary.py:token_texts": TOKENIZER,
    "export/hub/follow.py:__init__": START,
    "export/hub/follow.py:_listen": PIPE,
    "export/hub/pusher.py:main": PIPE,
    "tools/launch/launcher.py:children": PROC,
    "utils/system.py:processor": PROC,
    "utils/memory.py:anonymous_memory": PROC,
    "utils/memory.py:free_memory": PROC,
    "utils/memory.py:host_memory": PROC,
    "model/mapped.py:_mapped_storage": OWN,
    "model/mapped.py:file_system": PROC,
    "model/mapped.py:is_mapped": PROC,
    "config/options.py:_classes": "the source of the package",
    "tools/api/local_workers.py:_follow": START,
    "tools/report/page.py:_file": "a file of the package",
    "tools/demo/phrasing.py:read_table": "a file of the package",
    "checkpoint/identity.py:model_differences": "its own values, as JSON would give them back",
    "distributed/resilience/json_socket.py:receive": RANKS,
    "training/logging/metrics.py:_cut": OWN,
    "distributed/resilience/owner_file.py:_first_line": PROC,
    "distributed/resilience/owner_file.py:_stat": PROC,
    "distributed/resilience/owner_file.py:read_owner": LOCK,
    "distributed/resilience/owner_file.py:create_lock": LOCK,
    "distributed/resilience/run_owner.py:_take": LOCK,
    "distributed/resilience/run_owner.py:_write_own_file": LOCK,
    "training/same_on_ranks.py:described": "its own values",
    "distributed/resilience/stop_signals.py:slurm_end_time": START,
    "distributed/resilience/stack_dump.py:write_stacks": OWN,
    "training/engines/nvme_offload.py:_map": OWN,
}


def calls(path: Path) -> Iterator[tuple[str, int, str]]:
    """Function, line and text of each call that may read, parse or execute what others wrote."""
    tree = ast.parse(path.read_text())
    names: dict[str, str] = {}  # what a name of the file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(one.asname or one.name).split(".")[0]: one.name.split(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}

    for function, node in call_sites(tree):
        if _reads(node, names):
            yield function, node.lineno, ast.unparse(node)


def _reads(node: ast.Call, names: dict[str, str]) -> bool:
    first, *rest = dotted(node.func)
    whole = [*names.get(first, first).split("."), *rest]
    if whole[0] == "cloze" or (isinstance(node.func, ast.Name) and first not in names):
        whole = ["builtins", first] if not rest and first not in names else ["cloze"]
    found = READERS.get(whole[0], set())
    if whole[-1] in ("open", "fdopen", "ZipFile", "GzipFile", "TarFile") and _writes(
        node, 0 if rest and first not in names else 1
    ):
        return False
    return (found == "*" and len(whole) > 1) or whole[-1] in found or (bool(rest) and whole[-1] in METHODS)


def _writes(node: ast.Call, place: int) -> bool:
    """Whether the mode of `open` is one of writing."""
    given = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] or node.args[place : place + 1]
    mode = str(given[0].value) if given and isinstance(given[0], ast.Constant) else ""
    return bool(set(mode) & set("wax")) and "+" not in mode


def test_only_the_package_for_them_reads_files_of_others():
    found, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("utils/foreign/"):
            continue
        for function, line, text in calls(path):
            if f"{name}:{function}" in ALLOWED:
                used.add(f"{name}:{function}")
            else:
                found.append(f"{name}:{function}:{line}: {text}")
    assert not found, "use cloze.utils.foreign (read_json, read_yaml, open_regular, from_pretrained, ...)"
    assert sorted(set(ALLOWED) - used) == [], "allowed for nothing"


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "open('x', 'rb')",
        "open('x', mode='r+')",
        "open('x', 'w+b')",
        "Path('x').open()",
        "p.read_text()",
        "p.read_bytes()",
        "os.open(p, 0)",
        "os.fdopen(d)",
        "os.system(x)",
        "io.FileIO(p)",
        "mmap.mmap(d, 0)",
        "json.loads(x)",
        "json.load(f)",
        "orjson.loads(x)",
        "yaml.safe_load(x)",
        "yaml.load(x, Loader=L)",
        "pickle.loads(x)",
        "shelve.open(x)",
        "torch.load(f)",
        "torch.UntypedStorage.from_file(f)",
        "np.load(f)",
        "np.memmap(f)",
        "np.fromfile(f)",
        "safe_open(f)",
        "load_file(f)",
        "pyarrow.ipc.open_stream(f)",
        "pyarrow.parquet.ParquetFile(f)",
        "pq.read_table(f)",
        "pa.memory_map(f)",
        "AutoModel.from_pretrained(x)",
        "AutoModel.from_config(x)",
        "Tokenizer.from_file(x)",
        "gzip.open(f)",
        "zipfile.ZipFile(f)",
        "tarfile.open(f)",
        "zstandard.ZstdDecompressor()",
        "subprocess.run(x)",
        "importlib.import_module(x)",
        "eval(x)",
        "exec(x)",
        "loads(x)",
        "j.loads(x)",
    ],
)
def test_a_call_that_reads_is_seen(tmp_path: Path, text: str):
    imports = (
        "import gzip, importlib, io, json, json as j, mmap, numpy as np, orjson, os, pickle, pyarrow, pyarrow as pa\n"
        "import pyarrow.parquet, pyarrow.parquet as pq, shelve, subprocess, tarfile, torch, yaml, zipfile, zstandard\n"
        "from json import loads\nfrom safetensors import safe_open\nfrom safetensors.torch import load_file\n"
    )
    (tmp_path / "x.py").write_text(f"{imports}def f():\n    {text}\n")
    assert [(function, found) for function, _, found in calls(tmp_path / "x.py")] == [
        ("f", ast.unparse(ast.parse(text)))
    ]


@pytest.mark.parametrize(
    "text", ["open('x', 'w')", "open('x', mode='xb')", "p.open('a')", "read_json(p)", "model.eval()", "re.compile(x)"]
)
def test_a_call_that_writes_or_reads_nothing_of_others_is_none(tmp_path: Path, text: str):
    (tmp_path / "x.py").write_text(f"import re\nfrom cloze.utils.foreign.json_yaml import read_json\n{text}")
    assert list(calls(tmp_path / "x.py")) == []
