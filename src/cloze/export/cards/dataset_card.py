"""The card of a prepared folder that is published as a dataset.

text = dataset_card("owner/name", manifest, CardInfo(license="cc-by-4.0"))
"""

from __future__ import annotations

from typing import Any

from cloze.export.cards.markdown import fenced, in_table
from cloze.export.cards.metadata import CardInfo, hub_name, last_part, origin_of
from cloze.export.cards.reproduce import prepare_command
from cloze.utils.foreign.card_yaml import dump_yaml
from cloze.utils.foreign.lenient_read import part


def dataset_card(repo: str, manifest: dict[str, Any], info: CardInfo) -> str:
    """Return README.md for the blocks of a manifest: metadata with which `datasets` opens them, and their origin."""
    source = part(manifest, "source")
    splits = part(manifest, "splits")
    origin = origin_of(manifest)
    files = [{"split": split, "path": f"{split}/*.arrow"} for split in splits]
    metadata: dict[str, Any] = info.values() | {
        "task_categories": ["fill-mask"],
        "tags": ["cloze", "tokenized", "masked-lm"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    if origin:
        metadata["source_datasets"] = [origin]
    tokenizer = part(manifest, "tokenizer")
    rows = "\n".join(
        f"| {name} | {facts.get('documents', 0):,} | {facts.get('tokens', 0):,} | {facts.get('blocks', 0):,} |"
        for name, facts in splits.items()
    )
    name = repo.split("/")[-1]
    return f"""---
{dump_yaml(metadata)}
---
# {name}

Blocks of {manifest["block_size"]} tokens for masked language modeling, made by Cloze of
{in_table(origin or last_part(source.get("dataset_name")))} with the tokenizer
{in_table(hub_name(tokenizer.get("name")) or last_part(tokenizer.get("name")))}, which is in the folder `tokenizer`.

| split | documents | tokens | blocks |
|---|---|---|---|
{rows}

```python
from datasets import load_dataset

blocks = load_dataset("{repo}", split="train")      # input_ids: {manifest["block_size"]} token ids a row
```

To train on them, or to open them with `load_from_disk`, download the folder:

```sh
hf download {repo} --repo-type dataset --local-dir prepared/{name}
cloze train --dataset_name prepared/{name} --output_dir runs/{name} --model_type roberta
```

The checksum over all that the manifest says is `{manifest["checksum"]}`. Made again from the same text:

{fenced(prepare_command(manifest, f"prepared/{name}"), "sh")}

No text is in here that the blocks do not hold; they say what their source says, including its mistakes and prejudices.
"""
