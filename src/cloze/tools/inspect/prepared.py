"""Show the contents of a prepared folder: counts, fill, lengths and blocks as text; verify every byte if asked.

inspect_prepared(InspectConfig(data="prepared/eli5", verify=True))
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.config import InspectConfig
from cloze.data.batches.masking import Masking
from cloze.data.prepared.blocks import Blocks
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.prepared.text_report import report_lines, warnings_of
from cloze.data.prepared.verified import verify_prepared
from cloze.data.tokenizers.load import load_tokenizer
from cloze.utils.terminal.console import say, show, warn

SAMPLED_BLOCKS = 4096
BAR = 40
BOUNDARY, PADDING = " ⟦⏎⟧ ", "⟦{} padding⟧"


def inspect_prepared(config: InspectConfig) -> None:
    """Print it. Raises DataError for a folder that is not prepared or, with verify, damaged; ConfigError."""
    prepared = open_prepared(config.data)
    if config.split is not None:
        prepared.blocks(config.split)  # refused in the same words as everywhere if it is not there
    print_facts(prepared)
    for split in [config.split] if config.split else prepared.splits:
        blocks = prepared.blocks(split)
        say(split, split_line(prepared.manifest, split))
        print_histogram(piece_lengths(prepared, blocks), prepared)
        print_blocks(prepared, blocks, config.blocks)
    if config.verify:
        verify_prepared(config.data)
        count = sum(len(facts["shards"]) for facts in prepared.manifest["splits"].values())
        say("verify", f"all {count} shards are as they were written")


def print_facts(prepared: Prepared) -> None:
    """Print the source of the blocks and what made them."""
    manifest = prepared.manifest
    source, tokenizer = manifest["source"], manifest["tokenizer"]
    files = f", {len(source['files'])} files" if "files" in source else f", revision {source.get('revision')}"
    say("source", f"{source['dataset_name']} ({source['split']}), field {source['text_field']}{files}")
    say(
        "tokenizer",
        f"{tokenizer['name']} ({tokenizer['class']}, {tokenizer['vocab_size']:,} tokens), "
        f"fingerprint {tokenizer['fingerprint'][:12]}, encoded by {tokenizer.get('backend')}",
    )
    rule = {key: value for key, value in manifest["split_rule"].items() if key != "kind"}
    say("split", f"{manifest['split_rule']['kind']}: {', '.join(f'{key} {value}' for key, value in rule.items())}")
    say("blocks", f"{manifest['block_size']} tokens, {prepared.packing}; checksum {manifest['checksum'][:12]}")
    report = manifest.get("text_report", {})
    for name, line in report_lines(report).items():
        say("text", f"{name}: {line}")
    for line in warnings_of(report):
        warn(line)
    for reason, count in manifest.get("bad_records", {}).items():
        say("left out", f"{count:,} records: {reason}")


def split_line(manifest: dict[str, Any], name: str) -> str:
    """Return what became of a split's documents, in one line."""
    facts, size = manifest["splits"][name], manifest["block_size"]
    empty = f" ({facts['empty_documents']:,} empty)" if facts["empty_documents"] else ""
    fill = (facts["tokens"] - facts["dropped_tokens"]) / (facts["blocks"] * size)
    cut = facts["cut_documents"] / max(1, facts["documents"] - facts["empty_documents"])
    return (
        f"{facts['documents']:,} documents{empty}, {facts['tokens']:,} tokens -> "
        f"{facts['blocks']:,} blocks of {size}, "
        f"{fill:.1%} filled, {cut:.1%} of documents cut; {facts['dropped_tokens']} tokens left over"
    )


def piece_lengths(prepared: Prepared, blocks: Blocks) -> NDArray[np.int64]:
    """Return how many tokens of one document stand together in a block, for a sample of blocks spread over the split.

    With best_fit packing the pieces are stored; otherwise a document's first special token shows where it begins.
    """
    rows = np.unique(np.linspace(0, len(blocks) - 1, SAMPLED_BLOCKS).astype(np.int64))
    lengths = []
    for ids, segments in zip(blocks.read(rows), _segments(prepared, blocks, rows), strict=True):
        counts = np.bincount(segments)
        real = ids != prepared.manifest["tokenizer"]["pad_token_id"]
        lengths.append(counts[np.unique(segments[real])] if blocks.has_pieces else counts)
    return np.concatenate(lengths)


def print_histogram(lengths: NDArray[np.int64], prepared: Prepared) -> None:
    """Print a histogram of the lengths of the document pieces."""
    size = prepared.block_size
    edges = np.unique(np.linspace(1, size + 1, 9).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    show(f"{'':12} tokens of one document in a block (of {len(lengths):,} pieces looked at):")
    for first, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "█" * round(BAR * count / max(1, counts.max()))
        show(f"{'':12} {first:>6} - {end - 1:<6} {count / max(1, len(lengths)):6.1%}  {bar}")


def print_blocks(prepared: Prepared, blocks: Blocks, count: int) -> None:
    """Print some blocks, spread over the split, as text with the boundaries of documents shown."""
    if count == 0:
        return
    tokenizer = load_tokenizer(str(prepared.tokenizer_dir))
    rows = np.unique(np.linspace(0, len(blocks) - 1, min(count, len(blocks))).astype(np.int64))
    for row, ids, segments in zip(rows, blocks.read(rows), _segments(prepared, blocks, rows), strict=True):
        show(f"{'':12} block {row}:\n{'':14}{block_text(tokenizer, ids, segments)}")


def block_text(tokenizer: Any, ids: NDArray[np.int32], segments: NDArray[np.int32]) -> str:
    """Return one block [S] as text: each document's tokens decoded, boundaries and padding shown."""
    parts = []
    for segment in np.unique(segments):
        here = ids[segments == segment]
        if tokenizer.pad_token_id is not None and (here == tokenizer.pad_token_id).all():
            parts.append(PADDING.format(len(here)))
        else:
            parts.append(re.sub(r"\s+", " ", tokenizer.decode(here.tolist())).strip())
    return BOUNDARY.join(parts)


def _segments(prepared: Prepared, blocks: Blocks, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    if blocks.has_pieces:
        return blocks.read_segments(rows)
    begins = blocks.read(rows) == first_special(prepared)
    begins[:, 0] = False
    return np.cumsum(begins, axis=1).astype(np.int32)


def first_special(prepared: Prepared) -> int:
    """Return the special token with which a document begins; -1 where documents begin with none."""
    tokenizer = load_tokenizer(str(prepared.tokenizer_dir))
    ids = tokenizer("a")["input_ids"]
    special = set(Masking.from_manifest(prepared.manifest, seed=0).special_token_ids)
    return int(ids[0]) if ids and ids[0] in special else -1
