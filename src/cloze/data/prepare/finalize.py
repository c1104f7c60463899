"""From finished units to a prepared folder: join the tails, name the shards, write the manifest, rename.

Nothing is copied: shards are hard links to the units' files if the file system supports them. The folder appears
by one rename, so that it is there whole or not at all, and two processes may do this at once.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cloze.data.corpus.sources import Task
from cloze.data.prepare.text_sketch import HashCounts, merge_samples, text_report
from cloze.data.prepare.unit import (
    MAX_EXAMPLES,
    SIDES,
    Recipe,
    make_packer,
    process_name,
    read_hashes,
    read_sample,
    read_tail,
    read_unit,
    unit_name,
)
from cloze.data.prepared.packing import BestFit, Concat
from cloze.data.prepared.shards import ShardWriter, describe_split, open_prepared, shard_name, write_manifest
from cloze.data.tokenizers.written_tokenizer import tokenizer_files
from cloze.errors import ConfigError, DataError
from cloze.utils.atomic_files import disk_errors, publish, remove_tree, sync_tree
from cloze.utils.terminal.console import warn

JOIN_TOKENS = 2**22


def finalize(
    parts: Path,
    output: Path,
    recipe: Recipe,
    facts: dict[str, Any],
    named_validation: bool,
    tasks: list[Task],
    tokenizer: Any,
) -> dict[str, Any]:
    """Make `output` from the units in `parts`, remove `parts`, and return the manifest.

    Several processes may do this at once, and one may do it again: the first makes the folder, the others find it.
    Raises DataError if a unit of the tasks is missing, or there is too little text; DiskError if nothing can be
    written.
    """
    staged = parts / f"joined-{process_name()}"
    with disk_errors(output):
        try:
            remove_tree(staged)
            staged.mkdir()
            manifest = _assemble(staged, parts, recipe, facts, named_validation, tasks, tokenizer)
            sync_tree(staged)
            publish(staged, output)
        except (OSError, DataError):
            # Another process was quicker, and may have removed the units already.
            if not output.exists():
                raise
            manifest = open_prepared(output).manifest
        finally:
            remove_tree(staged, quietly=True)
    remove_tree(parts, quietly=True)
    return manifest


def _find_units(tasks: list[Task], units: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return every unit of the tasks in order, each with its facts. Raises DataError naming one that is missing.

    Each is opened by its name: a listing of the folder may be old on a network file system.
    """
    found = []
    for task in tasks:
        chunk, is_last = 0, False
        while not is_last:
            folder = units / unit_name(task.number, chunk)
            facts = read_unit(folder)
            if facts is None:
                what = f"unit {folder.name} is missing, of {len(tasks)} parts of the corpus"
                raise DataError(what, where=units, hint="run the same command again")
            found.append((folder, facts))
            chunk, is_last = chunk + 1, facts["last"]
    return found


def _assemble(
    staged: Path,
    parts: Path,
    recipe: Recipe,
    facts: dict[str, Any],
    named_validation: bool,
    tasks: list[Task],
    tokenizer: Any,
) -> dict[str, Any]:
    """Fill the folder `staged` and return its manifest. Raises as `finalize`."""
    corpus_name = str(facts["source"]["dataset_name"])
    units = _find_units(tasks, parts / "units")
    counts = {side: _count(units, side) for side in SIDES}
    try:
        _check_documents(units, counts, facts, corpus_name)
        splits = {side: _join(staged / side, units, side, recipe, counts[side]) for side in SIDES}
        few_ids = _has_few_ids(recipe, counts)
        _check_blocks(recipe, splits, corpus_name, named_validation, few_ids)
    except DataError:
        remove_tree(parts, quietly=True)  # the same units would end here again
        raise
    if splits["validation"]["blocks"] == 0:
        del splits["validation"]
        remove_tree(staged / "validation")
    shutil.copytree(parts / "tokenizer", staged / "tokenizer")
    bad = sum((Counter(unit["bad_records"]) for _, unit in units), Counter())
    examples = [line for _, unit in units for line in unit["examples"]][:MAX_EXAMPLES]
    if bad and not recipe.skip_bad_records:
        hint = "give --on_bad_record skip again, or begin again without it"
        raise ConfigError("records were left out", where=examples[0], hint=hint)
    skipped = {"bad_records": dict(sorted(bad.items())), "bad_record_examples": examples} if bad else {}
    report = {"text_report": _report(units, facts, tokenizer)}
    files = {"tokenizer_files": tokenizer_files(staged / "tokenizer")}
    return write_manifest(staged, facts | {"splits": splits} | skipped | report | files)


def _report(units: list[tuple[Path, dict[str, Any]]], facts: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the findings in the text of all units."""
    names = ("documents", "empty_documents", "text_tokens", "unknown_tokens")
    counts = {side: _count(units, side, names) for side in SIDES}
    hashes = HashCounts()
    for folder, _ in units:
        for side in SIDES:
            hashes.add(side, read_hashes(folder, side))
    there = [side for side in SIDES if counts[side]["documents"]]
    samples = {side: merge_samples(read_sample(folder, side) for folder, _ in units) for side in there}
    splitting, source = facts["split_special_tokens"], facts["source"]
    report = text_report({side: counts[side] for side in there}, hashes, samples, tokenizer, splitting)
    for side in there:
        described = source.get("validation", source) if side == "validation" else source
        if "files" in described:
            report[side]["files"] = len(described["files"])
    return report


def _count(
    units: list[tuple[Path, dict[str, Any]]],
    side: str,
    names: tuple[str, ...] = ("documents", "empty_documents", "cut_documents", "tokens"),
) -> dict[str, int]:
    return {name: sum(unit["splits"][side][name] for _, unit in units) for name in names}


def _join(
    folder: Path, units: list[tuple[Path, dict[str, Any]]], side: str, recipe: Recipe, counts: dict[str, int]
) -> dict[str, Any]:
    """Link the shards of one split in order, add one for the joined tails, and describe the split."""
    folder.mkdir()
    pieces = recipe.packing == "best_fit"
    files = [(path / f"{side}.arrow", unit["splits"][side]["shard"]) for path, unit in units]
    shards = [(path, shard) for path, shard in files if shard is not None]
    rest = folder / "tails.arrow"
    writer = ShardWriter(rest, recipe.block_size, pieces)
    packer = make_packer(recipe)
    for path, unit in units:
        lengths = np.array(unit["splits"][side]["tail"], np.int64)
        if len(lengths):
            _pack(packer, writer, read_tail(path, side), lengths)
    if isinstance(packer, BestFit):
        writer.add(packer.flush())
    joined = writer.close()
    if joined is not None:
        shards.append((rest, joined))
    listed = []
    for number, (path, shard) in enumerate(shards):
        name = shard_name(number, len(shards))
        _link(path, folder / name)
        listed.append({"file": name, **shard})
    rest.unlink(missing_ok=True)
    describe_split(folder, listed, recipe.block_size, pieces)
    blocks = sum(shard["blocks"] for shard in listed)
    return {**counts, "blocks": blocks, "dropped_tokens": packer.left_over, "shards": listed}


def _pack(packer: Concat | BestFit, writer: ShardWriter, tokens: Any, lengths: Any) -> None:
    if isinstance(packer, Concat):
        writer.add(packer.add(tokens, lengths))
        return
    packer.add(tokens, lengths)
    if packer.left_over >= JOIN_TOKENS:
        writer.add(packer.flush())


def _link(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links here
        shutil.copyfile(path, name)


def _check_documents(
    units: list[tuple[Path, dict[str, Any]]],
    counts: dict[str, dict[str, int]],
    facts: dict[str, Any],
    corpus_name: str,
) -> None:
    """Raise DataError if there is nothing at all."""
    documents = sum(counts[side]["documents"] for side in SIDES)
    if documents == 0:
        left_out = sum(count for _, unit in units for count in unit["bad_records"].values())
        if left_out:
            first = next(line for _, unit in units for line in unit["examples"])
            raise DataError(f"all {left_out:,} records were left out", where=corpus_name, hint=f"the first: {first}")
        split = facts["source"].get("split")
        raise DataError("no documents", where=corpus_name, hint=f"is split {split!r} empty?")
    if documents == sum(counts[side]["empty_documents"] for side in SIDES):
        raise DataError(f"all {documents} documents are empty", where=corpus_name, hint="check --text_field")


def _has_few_ids(recipe: Recipe, counts: dict[str, dict[str, int]]) -> bool:
    """Return whether the validation side is so small or large that many documents must have the same id. By chance,
    one in 10,000 draws is 4 standard deviations away."""
    total, share = sum(counts[side]["documents"] for side in SIDES), recipe.validation_percentage / 100
    away = abs(counts["validation"]["documents"] - total * share)
    return away > max(4 * math.sqrt(total * share * (1 - share)), total * share / 2)


def _check_blocks(
    recipe: Recipe, splits: dict[str, dict[str, Any]], corpus_name: str, named_validation: bool, few_ids: bool
) -> None:
    """Raise DataError if a split has nothing to train or validate on. `few_ids`: see `_has_few_ids`."""
    documents = {name: facts["documents"] for name, facts in splits.items()}
    share = f"{documents['validation']:,} of {sum(documents.values()):,} documents are validation documents"
    same = f"{share}, not {recipe.validation_percentage:g} %: many have the same id, or text"
    other_ids = "give the --id_field of another field, whose values differ"
    if few_ids and splits["train"]["blocks"]:
        warn(f"{same}; {other_ids}")
        return
    for name, wanted in (("train", True), ("validation", named_validation)):
        facts = splits[name]
        if facts["blocks"]:
            continue
        short = (
            f"{facts['tokens']} tokens in {facts['documents']} documents are less than a block of {recipe.block_size}"
        )
        if few_ids:
            raise DataError(f"{name}: {same}", where=corpus_name, hint=other_ids)
        if wanted:
            raise DataError(f"{name}: {short}", where=corpus_name, hint="use more text or a smaller --block_size")
        if recipe.validation_percentage:
            warn(f"no validation blocks: {short}; use more text or a larger --validation_split_percentage")
