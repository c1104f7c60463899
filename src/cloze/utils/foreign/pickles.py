"""Pickles and files of torch.save, read without running anything that is in them.

    read_pickle(folder / ".metadata", RECORDS)          # records instead of objects; no foreign code runs
    load_torch(file, what="rank 3's file", shells=...)  # tensors, numbers, text and containers of them

A pickle of a few bytes can stand for gigabytes, or for an hour of work: an object may be named again and again, and
hashing a tuple hashes all that is in it. So a pickle is first read by an interpreter of our own, in which a key of a
mapping is text, a number, a record or a flat tuple of these, and values have limits. torch.save's files are zip
archives: their members must be stored uncompressed, so that nothing is larger in memory than on the disk.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

from cloze.errors import CheckpointError, ClozeError, ConfigError
from cloze.utils.foreign.paths import open_regular, printable, size_text

MAX_PICKLE_BYTES = 256 << 20
MAX_MEMBERS = 1_000_000
MAX_DIMENSIONS = 64
MAX_KEY_PARTS = 256
# What zipfile raises for a file that is not an archive of torch.save, or is damaged.
NO_ARCHIVE = (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, ValueError)
_HINT = "use an earlier checkpoint"
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class Record:
    """Stands for an object in a pickle: its fields, and no code."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Shell(Record):
    """Replaces an object that is not needed; accepts any operation of a pickle."""

    def __call__(self, *_: Any, **__: Any) -> _Shell:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Forget an item of a list."""

    def add(self, _: Any) -> None:
        """Forget an item of a set."""

    def extend(self, _: Any) -> None:
        """Forget items of a list."""


_Interpreter: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Guarded(_Interpreter):  # type: ignore[misc]
    """The interpreter of the standard library in Python, with limits on what is hashed."""

    dispatch: ClassVar[Any] = dict(_Interpreter.dispatch)
    stack: list[Any]

    def _check_keys(self, keys: list[Any]) -> None:
        if not all(map(_is_key, keys)):
            raise pickle.UnpicklingError("a key is neither text, a number nor a short tuple of them")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        self._check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        self._check_keys(self.stack)
        super().load_frozenset()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], Record):
            raise pickle.UnpicklingError("state is given to what takes none")
        super().load_build()

    for _code, _method in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BUILD, load_build),
    ):
        dispatch[_code[0]] = _method


class _Records(_Guarded):
    """Makes records, shapes, types and paths; refuses everything else before anything of it is made."""

    def __init__(self, file: IO[bytes], records: Mapping[str, set[str]]):
        super().__init__(file)
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if name in self._records.get(module, ()):
            return type(name, (Record,), {})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return sizes
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _text
        if module.split(".")[0] == "pathlib" and name in _PATHS:
            return _path
        raise _Unknown(f"{module}.{name}")


class _DryRun(_Guarded):
    """Makes nothing: finds out whether the interpreter of torch may read the same pickle."""

    def find_class(self, module: str, name: str) -> Any:
        return _Shell()

    def persistent_load(self, _: Any) -> Any:
        return _Shell()

    def load_reduce(self) -> None:
        self.stack.pop()
        self.stack[-1] = _Shell()

    def load_newobj(self) -> None:
        self.stack.pop()
        self.stack[-1] = _Shell()

    dispatch: ClassVar[Any] = dict(_Guarded.dispatch)
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj


class _Unknown(Exception):
    """A pickle names a class that is not admitted."""


def sizes(values: Any) -> tuple[int, ...]:
    """Return a shape or an offset from a pickle. Raises ValueError if it is not a few numbers of elements."""
    if not isinstance(values, list | tuple) or len(values) > MAX_DIMENSIONS:
        raise ValueError("a shape is not a short list of numbers")
    if not all(type(one) is int and 0 <= one < 1 << 63 for one in values):
        raise ValueError("a shape has something other than numbers of elements in it")
    return tuple(values)


def read_pickle(file: Path, records: Mapping[str, set[str]], folder: Path | None = None) -> Any:
    """Return what is in a pickle, with a Record for each object of the classes `records` (names by module).

    Raises CheckpointError if it is damaged or beyond the limits, ConfigError if it holds objects of other classes.
    """
    with open_regular(file, folder=folder, error=CheckpointError) as stream:
        content = stream.read(MAX_PICKLE_BYTES + 1)
    if len(content) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"is larger than {size_text(MAX_PICKLE_BYTES)}", where=file, hint=_HINT)
    try:
        return _Records(io.BytesIO(content), records).load()
    except _Unknown as problem:
        raise runs_code(f"it holds a Python object, {problem}", file, "load it with torch if you trust it") from None
    except Exception as problem:  # any error of a damaged pickle
        raise CheckpointError(f"it is damaged ({reason(problem)})", where=file, hint=_HINT) from None


def load_torch(file: Path, what: str, shells: re.Pattern[str], unknown_hint: str) -> Any:
    """Return what torch.save wrote into a file: tensors (mapped), numbers, text and containers. Objects whose names
    match `shells` become empty shells.

    `what`: the file in the words of messages. Raises CheckpointError if it is damaged, ConfigError if it holds other
    objects, without running any code of them.
    """
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        with open_regular(file, error=CheckpointError) as stream:
            check_archive(stream)
        names = get_unsafe_globals_in_checkpoint(file)
    except ClozeError:
        raise
    except Exception as problem:  # any error of torch on a damaged file
        raise CheckpointError(f"{what} is damaged ({reason(problem)})", where=file, hint=_HINT) from None
    unknown = [name for name in names if not shells.match(name)]
    if unknown:
        raise runs_code(f"{what} holds a Python object, {printable(unknown[0])}", file, unknown_hint)
    try:
        with safe_globals([(_Empty, name) for name in names]):  # type: ignore[list-item]
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as problem:  # the same
        raise CheckpointError(f"{what} is damaged ({reason(problem)})", where=file, hint=_HINT) from None


class _Empty:
    """Replaces an object that is not needed when torch reads the file."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load_torch_stream(stream: IO[bytes]) -> Any:
    """Return what torch.save wrote into a stream that can be searched. Raises pickle.UnpicklingError for objects, and
    whatever torch raises for a damaged one."""
    import torch

    check_archive(stream)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)


def check_archive(stream: IO[bytes]) -> None:
    """Raise ValueError or zipfile.BadZipFile if torch may not read an archive: a member is compressed, there are too
    many, or its pickle is larger than the limit or costs more than its size."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"{len(members):,} members")
        if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members):
            raise ValueError("a member is compressed, which torch.save does not do")
        for one in members:
            if one.filename.endswith(".pkl"):
                if one.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"its pickle is larger than {size_text(MAX_PICKLE_BYTES)}")
                try:
                    _DryRun(io.BytesIO(archive.read(one))).load()
                except (LookupError, AttributeError, TypeError) as problem:
                    raise ValueError(f"its pickle is damaged: {reason(problem)}") from None


def damaged_member(file: Path | IO[bytes]) -> str | None:
    """Return the first member of a torch.save archive whose checksum (CRC-32) is not that of its bytes; None if all
    are well. Raises one of NO_ARCHIVE if it is not one."""
    if isinstance(file, Path):
        with open_regular(file, error=CheckpointError) as stream:
            return damaged_member(stream)
    with zipfile.ZipFile(file) as archive:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise ValueError("a member is compressed, which torch.save does not do")
        return archive.testzip()


def reason(problem: object) -> str:
    """Return the first line of what a parser raised, short and printable."""
    return printable((str(problem) or type(problem).__name__).strip().split("\n")[0][:120])


def runs_code(what: str, file: Path, hint: str) -> ConfigError:
    """Return the error for a file that holds an object whose reading could run code."""
    return ConfigError(f"{what}, and reading it could run code", where=file, hint=hint)


def _is_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return len(key) <= MAX_KEY_PARTS and all(_is_flat(one) for one in key)
    return _is_flat(key)


def _is_flat(key: Any) -> bool:
    return key is None or isinstance(key, str | bytes | int | float | Record) or type(key).__module__ == "torch"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a layout is not text")
    return value


def _path(*parts: Any) -> PurePosixPath:
    if len(parts) > MAX_DIMENSIONS or not all(isinstance(one, str) and len(one) < 4096 for one in parts):
        raise ValueError("a path is not a few names")
    return PurePosixPath(*parts)
