"""Prepare a corpus in bounded memory, on any number of processes and machines.

    documents -> token ids with special tokens -> blocks    unit by unit (cloze.data.prepare.unit), part of the corpus
    units -> shards and manifest                            when all units are done (cloze.data.prepare.finalize)

    prepare(PrepareConfig(dataset_name="corpus.jsonl", tokenizer_name="roberta-base", output="prepared/corpus"))

Unfinished work is in OUTPUT.parts: plan.json (corpus and settings), the tokenizer, and the units.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cloze.config import BlocksConfig, PrepareConfig
from cloze.config.relations import check_relations
from cloze.data.corpus.fields import BadRecord
from cloze.data.corpus.local_files import split_of
from cloze.data.corpus.sources import Corpus, document_of, items_of, open_corpus
from cloze.data.prepare.finalize import finalize
from cloze.data.prepare.scheduler import WorkerShard, do_units, missing_units, owners, start_method
from cloze.data.prepare.unit import Recipe, read_unit
from cloze.data.prepare.work_dir import open_parts, read_plan, refuse_differences
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.prepared.text_report import warnings_of
from cloze.data.tokenizers.encoders import backend_version
from cloze.data.tokenizers.load import describe, load_tokenizer
from cloze.data.tokenizers.select_encoder import choose_encoder
from cloze.data.tokenizers.token_ids import unknown_id
from cloze.errors import ClozeError, ConfigError, DataError
from cloze.utils.atomic_files import check_writable, parse_size, remove_tree
from cloze.utils.terminal.console import say, warn

SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 50, 100_000


@dataclass(frozen=True)
class Inputs:
    """The inputs of a prepared folder. `facts`: their description in its manifest."""

    tokenizer: Any
    corpus: Corpus
    facts: dict[str, Any]


def open_inputs(config: BlocksConfig, tokenizer_name: str) -> Inputs:
    """Open and describe corpus and tokenizer. Raises ConfigError, DataError or ModelError."""
    unit_bytes = parse_size(config.unit_size, "--unit_size")
    tokenizer = load_tokenizer(tokenizer_name, config.trust_remote_code, config.token)
    _check_tokenizer(config, tokenizer)
    corpus = open_corpus(config, config.validation_split, unit_bytes, identify=True)
    held_out = [name for name in corpus.splits if split_of(name) == "validation" and not config.split.startswith(name)]
    if held_out and config.validation_split is None and config.validation_split_percentage:
        hint = f"--validation_split {held_out[0]} takes it, --validation_split_percentage 0 takes none"
        warn(f"the split {held_out[0]} is not used: validation documents are taken from {config.split}; {hint}")
    facts: dict[str, Any] = {
        "block_size": config.block_size,
        "packing": config.packing,
        "split_special_tokens": config.split_special_tokens,
        "tokenizer": describe(tokenizer, tokenizer_name),
        "source": corpus.description,
        "split_rule": _split_rule(config),
        "unit_size": unit_bytes,
    }
    return Inputs(tokenizer, corpus, facts)


def make_recipe(config: BlocksConfig, inputs: Inputs, backend: str) -> Recipe:
    """Return how documents become blocks, with the requested tokenizer backend or the fastest that fits."""
    encoder = choose_encoder(
        inputs.tokenizer,
        backend,
        config.split_special_tokens,
        sample_texts(inputs.corpus),
        config.trust_remote_code,
    )
    return Recipe(
        encoder=encoder,
        fields=inputs.corpus.fields,
        block_size=config.block_size,
        packing=config.packing,
        pad_token_id=inputs.tokenizer.pad_token_id,
        validation_percentage=0.0 if config.validation_split else float(config.validation_split_percentage),
        skip_bad_records=config.on_bad_record == "skip",
        unk_token_id=unknown_id(inputs.tokenizer),
    )


def prepare(config: PrepareConfig, inputs: Inputs | None = None) -> dict[str, Any] | None:
    """Make the prepared folder `config.output` and return its manifest; None if units of other shards are missing.

    An existing folder of the same corpus and settings is kept. Raises ConfigError, DataError, ModelError or DiskError;
    the folder is complete or absent.
    """
    manifest = _prepare(config, inputs)
    if manifest is not None and (bad := manifest.get("bad_records")):
        warn(f"left out: {', '.join(f'{count:,} records ({reason})' for reason, count in bad.items())}")
        for line in manifest["bad_record_examples"][:3]:
            warn(f"  {line}")
    return manifest


def _prepare(config: PrepareConfig, inputs: Inputs | None) -> dict[str, Any] | None:
    output = Path(config.output)
    if not output.exists():
        check_writable(output)
    parts = output.with_name(f"{output.name}.parts")
    share = check_share(config)
    num_proc = config.num_proc or usable_cores()
    if num_proc > 1 and not output.exists():
        start_method()  # starts in the background while the tokenizer loads
    inputs = inputs or open_inputs(config, config.tokenizer_name)
    corpus, facts = inputs.corpus, inputs.facts
    if output.exists():
        return _done_meanwhile(config, output, parts, facts)
    before = read_plan(parts)
    if before is None and config.finalize:
        raise DataError("nothing has been begun here", where=parts, hint="run without --finalize first")
    # Use the backend with which other shards have begun.
    begun_with = str(before["tokenizer"]["backend"]).split()[0] if before else "auto"
    recipe = make_recipe(
        config, inputs, begun_with if config.tokenizer_backend == "auto" else config.tokenizer_backend
    )
    facts["tokenizer"]["backend"] = backend_version(recipe.encoder.backend)
    if before is not None:
        refuse_differences(parts, before, facts)
    units = parts / "units"
    try:
        open_parts(parts, facts, inputs.tokenizer)
        if output.exists():  # made by another process meanwhile
            return _done_meanwhile(config, output, parts, facts)
        if not config.finalize:
            say("prepare", f"{corpus.description['dataset_name']} with {facts['tokenizer']['backend']}")
            do_units(recipe, corpus.tasks, units, num_proc, share, facts["unit_size"])
        missing = missing_units(corpus.tasks, units)
        if not missing:
            named = config.validation_split is not None
            manifest = finalize(parts, output, recipe, facts, named, corpus.tasks, inputs.tokenizer)
            for line in warnings_of(manifest.get("text_report", {})):
                warn(line)
            return manifest
    except (ClozeError, OSError):
        if output.exists():  # made by another process meanwhile, which then removed these parts
            return _done_meanwhile(config, output, parts, facts)
        if share.count == 1 and not any(read_unit(unit) for unit in units.glob("0*")):
            remove_tree(parts, quietly=True)  # no unit was finished, so there is nothing to resume
        raise
    if output.exists():
        return _done_meanwhile(config, output, parts, facts)
    again = ", ".join(map(str, owners(corpus.tasks, missing, share.count)))
    if config.finalize:
        what = f"{len(missing)} of {len(corpus.tasks)} parts of the corpus are missing"
        hint = f"run --shard_index {again} again" if share.count > 1 else "run without --finalize"
        raise DataError(what, where=parts, hint=hint)
    say("prepare", f"shard {share.index} of {share.count} is done; still to come from --shard_index {again}")
    return None


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_share(config: PrepareConfig) -> WorkerShard:
    """Return this process's share of the work. Raises ConfigError if the share is invalid."""
    check_relations(config)
    if config.shard_index is None:
        if config.num_shards > 1 and not config.finalize:
            raise ConfigError("which of them is this?", where="--num_shards", hint="give --shard_index 0, 1, ...")
        return WorkerShard(0, config.num_shards)
    return WorkerShard(config.shard_index, config.num_shards)


def _check_tokenizer(config: BlocksConfig, tokenizer: Any) -> None:
    if config.block_size > tokenizer.model_max_length:
        warn(f"blocks of {config.block_size} tokens, but the tokenizer is for models of {tokenizer.model_max_length}")
    if config.packing == "best_fit" and tokenizer.pad_token_id is None:
        raise ConfigError(
            "needs a tokenizer with a padding token", where="--packing best_fit", hint="use --packing concat"
        )


def sample_texts(corpus: Corpus) -> list[str]:
    """Return texts from the corpus's beginning, middle and end, on which backends are compared."""
    texts: list[str] = []
    places = {0, len(corpus.tasks) // 2, len(corpus.tasks) - 1} if corpus.tasks else set()
    for number in sorted(places):
        held = 0
        for _, raw in islice(items_of(corpus.tasks[number], corpus.fields), SAMPLE_DOCUMENTS):
            with suppress(BadRecord):
                texts.append(document_of(raw, corpus.fields).text[:SAMPLE_CHARACTERS])
                held += len(texts[-1])
            if held >= SAMPLE_CHARACTERS:
                break
    return texts


def _done_meanwhile(config: PrepareConfig, output: Path, parts: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of an existing folder, and remove leftovers of its preparation."""
    manifest = _same_as_before(config, output, facts)
    remove_tree(parts, quietly=True)
    return manifest


def _same_as_before(config: PrepareConfig, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of an existing folder. Raises ConfigError if its corpus or settings differ."""
    try:
        found = open_prepared(output)
    except DataError as error:
        # The folder may be the corpus itself or contain it, so the hint is not to delete it.
        what = f"exists already ({error.what})"
        raise ConfigError(what, where=output, hint="choose another --output") from None
    manifest = found.manifest
    backend = manifest["tokenizer"].get("backend", "")
    forced = config.tokenizer_backend not in ("auto", str(backend).split(" ")[0])
    facts["tokenizer"]["backend"] = config.tokenizer_backend if forced else backend
    refuse_differences(output, manifest, facts)
    refuse_bad_records(config, found)
    say("prepare", "done already; nothing to do")
    return manifest


def refuse_bad_records(config: BlocksConfig, prepared: Prepared) -> None:
    """Raise DataError if records were left out of a prepared folder and the options do not allow that."""
    count = sum(prepared.manifest.get("bad_records", {}).values())
    if count and config.on_bad_record != "skip":
        raise DataError(
            f"{count:,} bad records were left out when it was prepared",
            where=prepared.folder,
            hint="give --on_bad_record skip to use it, or correct the corpus",
        )


def _split_rule(config: BlocksConfig) -> dict[str, Any]:
    if config.validation_split is not None:
        return {"kind": "named", "validation": config.validation_split.strip()}
    return {"kind": "hash of the document's id", "validation_percentage": float(config.validation_split_percentage)}
