"""`cloze inspect` says what is in a prepared folder, as it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cloze.cli import main
from cloze.config import PrepareConfig
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.shards import open_prepared


def inspect(*argv: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["inspect", *(str(word) for word in argv)])
    return int(leaving.value.code or 0)


@pytest.fixture(scope="module")
def packed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "p"
    folder = prepared.parent
    prepare(
        PrepareConfig(
            dataset_name=str(folder / "corpus.jsonl"),
            text_field="answers.text",
            tokenizer_name=str(folder / "tokenizer"),
            output=str(output),
            block_size=64,
            packing="best_fit",
            validation_split_percentage=10,
        )
    )
    return output


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_counts_blocks_and_boundaries_are_shown(prepared: Path, packed: Path, capsys, kind: str):
    folder = prepared if kind == "concat" else packed
    assert inspect(folder, "--blocks", 2, "--verify") == 0
    out = capsys.readouterr().out
    opened = open_prepared(folder)
    for split, facts in opened.manifest["splits"].items():
        assert re.search(rf"^{split} +{facts['documents']:,} documents, {facts['tokens']:,} tokens", out, re.MULTILINE)
        assert f"{facts['blocks']:,} blocks of {opened.block_size}" in out
    assert f"fingerprint {opened.manifest['tokenizer']['fingerprint'][:12]}" in out
    assert re.search(r"all \d shards are as they were written", out)
    shares = [float(share) for share in re.findall(r" - \d+ +([\d.]+)%", out)]
    assert abs(sum(shares) - 200) < 1.0  # two splits, 100 % each
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer_dir)
    block = opened.blocks("train").read(np.array([0]))[0]
    segments = opened.blocks("train").read_segments(np.array([0]))[0] if kind == "best_fit" else None
    shown = next(text for text in out.split("block 0:\n")[1:2]).splitlines()[0]
    parts = [part for part in shown.strip().split(" ⟦⏎⟧ ") if not part.startswith("⟦")]
    if segments is None:
        assert " ".join(parts) == re.sub(r"\s+", " ", tokenizer.decode(block)).replace("</s><s>", "</s> <s>").strip()
    else:
        pieces = [tokenizer.decode(block[segments == number]) for number in range(segments.max() + 1)]
        assert parts == [re.sub(r"\s+", " ", piece).strip() for piece in pieces if "<pad>" not in piece]


def test_damage_is_found_with_verify_only(packed: Path, tmp_path: Path, capsys):
    folder = tmp_path / "p"
    shutil.copytree(packed, folder)
    shard = next((folder / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert inspect(folder) == 0
    capsys.readouterr()
    assert inspect(folder, "--verify") == 2
    assert f"{shard}: damaged: the checksum differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere"], "no such folder"),
        (["{prepared}", "--split", "test"], "no split 'test'; the splits are: train, validation"),
        (["{prepared}", "--blocks", "-1"], "--blocks: must be at least 0"),
    ],
)
def test_bad_input_is_one_line(prepared: Path, capsys, argv: list[str], expected: str):
    assert inspect(*(word.format(prepared=prepared) for word in argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
