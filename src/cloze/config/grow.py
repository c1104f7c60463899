"""Options of `cloze grow`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cloze.config.ranges import SIZE, Ranged


@dataclass(kw_only=True)
class GrowConfig(Ranged):
    """Make an initial model from a trained one: for another tokenizer, deeper or wider. Give the folder to `cloze
    train` as --model_name_or_path; its grown.json records the sources."""

    source: str
    """a model folder, a run's folder (its `model`), or a model on the Hub"""
    output: str
    """the folder to make"""
    tokenizer: str | None = None
    """the tokenizer of the new model, a local folder or one on the Hub: tokens that both have keep their embeddings,
    new ones get the mean of the pieces that the old tokenizer cuts them into"""
    config_overrides: str | None = None
    """the numbers that grow: `num_hidden_layers=24,hidden_size=1024,num_attention_heads=16`"""
    config_name: str | None = None
    """the configuration of the new model, a folder or a model on the Hub of the same architecture"""
    method: Literal["tile", "function_preserving"] = "tile"
    """`tile`: weights repeated around the old ones in the middle, as ModernBERT-large was begun;
    `function_preserving`: so that the new model answers exactly as the old one (widths that are a multiple; more
    layers only where norms come first)"""
    max_shard_size: Annotated[str, SIZE] = "5GB"
    """largest size of one weights file"""
    token: str | None = None
    """a Hub token (default: the one of `hf auth login`)"""
