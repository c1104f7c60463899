"""Read a trained model, and write the initial model made from it.

    warm_start(GrowConfig(source="roberta-base", tokenizer="tokenizers/mine", output="start"))
    warm_start(GrowConfig(source="runs/base", config_overrides="num_hidden_layers=24", output="start"))

The old weights are mapped from their files, and the new ones made and written tensor by tensor: memory holds a few
tensors. Before the folder gets its name it is read again, compared by checksum, and loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from cloze.checkpoint.lineage import of_tensors, write_record
from cloze.checkpoint.model_path import resolve_model_path
from cloze.config import GrowConfig
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import ConfigError, ModelError
from cloze.export.consolidation.model_folder import compare_sums, name_of_dtype, tidy_config, write_weights
from cloze.export.consolidation.stored import Stored
from cloze.model.archs import POSITIONS_AFTER_PADDING, check_padding
from cloze.model.depth import layer_depths
from cloze.model.load import fit_vocabulary, load_checked, usable_length
from cloze.model.overrides import apply_overrides, check_reads_both_ways, check_token_ids, parse_overrides
from cloze.model.weights import load_weights
from cloze.tools.grow.axes import Growth, Map, blank_model, find_axes, heads_of, shapes_of, whole_numbers
from cloze.tools.grow.depth import LayerSource, layer_sources
from cloze.tools.grow.exact import LAST, before_decoder, check_possible, compare, shares
from cloze.tools.grow.vocabulary import Rows, special_tokens, vocabulary_rows
from cloze.utils.atomic_files import parse_size, staged_folder, write_json
from cloze.utils.foreign.pretrained import from_pretrained
from cloze.utils.shareable import basename_paths
from cloze.utils.system import versions_of

NOTE = "grown.json"


@dataclass
class Recipe:
    """How the weight `name` of the new model is made of `old_name` of the old one. `axes`: old places by axis;
    `vocabulary`: the axis of tokens; `scale`: what each place of an axis is multiplied with; `zero`: by nothing."""

    name: str
    old_name: str
    axes: dict[int, Map] = field(default_factory=dict)
    vocabulary: int | None = None
    scale: dict[int, torch.Tensor] = field(default_factory=dict)
    zero: bool = False

    def make(self, tensors: dict[str, torch.Tensor], rows: Rows | None) -> torch.Tensor:
        """Return the new weight."""
        weight = tensors[self.old_name].detach()
        if self.vocabulary is not None and rows is not None:
            weight = rows.apply(weight, self.vocabulary)
        for axis, places in self.axes.items():
            weight = weight.index_select(axis, places)
        for axis, factors in self.scale.items():
            shape = [-1 if other == axis else 1 for other in range(weight.dim())]
            weight = (weight * factors.view(shape)).to(weight.dtype)
        return torch.zeros_like(weight) if self.zero else weight.contiguous()


@dataclass(frozen=True)
class Done:
    """Summary for the user: changed numbers, sources of the tokens, and the comparison made."""

    changes: dict[str, tuple[int, int]]
    tokens: dict[str, int]
    compared: str


def warm_start(config: GrowConfig) -> Done:
    """Write the folder `config.output`. Raises ConfigError or ModelError in one line before anything is written."""
    output, max_shard_bytes = Path(config.output), parse_size(config.max_shard_size, "--max_shard_size")
    if output.exists():
        raise ConfigError("exists already", where=output, hint="choose another --output")
    folder = resolve_model_path(config.source, consolidated=True).folder
    old = load_weights(folder, dtype="auto", token=config.token).eval()  # mapped from the files
    tokenizer = load_tokenizer(folder, token=config.token)
    new_tokenizer = tokenizer if config.tokenizer is None else load_tokenizer(config.tokenizer, token=config.token)
    new_config = _new_config(old.config, config, tokenizer, new_tokenizer)
    changes = _changes(old.config, new_config)
    reshaped = bool(config.config_overrides or config.config_name)
    if not reshaped and config.tokenizer is None:
        raise ConfigError(
            "what is to be changed?", where="cloze grow", hint="give --tokenizer, --config_overrides or --config_name"
        )
    size = new_config.get_text_config().vocab_size
    rows = None if config.tokenizer is None else vocabulary_rows(tokenizer, new_tokenizer, size)
    new, layers, recipes = _recipes(old, new_config, config.method == "function_preserving")
    tensors = old.state_dict()
    stored = [_stored(recipe, tensors, rows, shape, config.source) for recipe, shape in recipes]
    exact = config.method == "function_preserving" or not reshaped
    with staged_folder(output) as staged:
        new_config.architectures = [type(new).__name__]
        new_config.save_pretrained(staged)
        new_tokenizer.save_pretrained(staged)
        tidy_config(staged, old.dtype)
        files = write_weights(staged, stored, max_shard_bytes, old.dtype)
        sums = compare_sums(staged, files, stored, old.dtype)
        write_record(staged, of_tensors(sums, name_of_dtype(old.dtype), "grown"))
        grown = load_checked(staged)
        compared = compare(old, grown, rows, reshaped) if exact else "loaded again"
        note = _note(config, changes, rows, layers)
        write_json(staged / NOTE, note)
    return Done(changes, dict(rows.kinds) if rows else {}, compared)


def _new_config(old: PretrainedConfig, config: GrowConfig, tokenizer: Any, new_tokenizer: Any) -> PretrainedConfig:
    """Return the new configuration: the old one or that of --config_name, with overrides, fit to a new tokenizer."""
    overrides = parse_overrides(config.config_overrides)
    new = copy.deepcopy(old)
    if config.config_name is not None:
        new = from_pretrained(AutoConfig, config.config_name, token=config.token)
        if new.model_type != old.model_type:
            raise ConfigError(
                f"{new.model_type} cannot be made from {old.model_type}",
                where="--config_name",
                hint="the architecture stays the same",
            )
        new.get_text_config().vocab_size = old.get_text_config().vocab_size
        fit_vocabulary(new.get_text_config(), tokenizer, {"vocab_size"})
    if "vocab_size" in overrides:
        raise ConfigError("follows the tokenizer", where="--config_overrides vocab_size", hint="give --tokenizer")
    apply_overrides(new, overrides)
    check_reads_both_ways(new, config.config_name or config.source, overrides)
    check_token_ids(new, overrides, new_tokenizer)
    if config.tokenizer is not None:
        text, before = new.get_text_config(), old.get_text_config()
        check_padding(new, new_tokenizer, usable_length(old) or 0)
        fit_vocabulary(text, new_tokenizer, set())
        moved = {there: here for here, there in special_tokens(tokenizer, new_tokenizer).items()}
        for name in ("decoder_start_token_id", "forced_eos_token_id"):
            if getattr(text, name, None) is not None:
                setattr(text, name, moved.get(getattr(text, name), new_tokenizer.eos_token_id))
        if old.model_type in POSITIONS_AFTER_PADDING:  # they begin after the padding's id, which may be another now
            text.max_position_embeddings += _padding(text) - _padding(before)
    return new


def _changes(old: PretrainedConfig, new: PretrainedConfig) -> dict[str, tuple[int, int]]:
    before, after = whole_numbers(old), whole_numbers(new)
    return {name: (before[name], value) for name, value in after.items() if before.get(name, value) != value}


def _recipes(
    old: Any, new_config: PretrainedConfig, exact: bool
) -> tuple[Any, dict[str, LayerSource], list[tuple[Recipe, tuple[int, ...]]]]:
    """Return a blank model of the new configuration, where its layers come from, and how each weight in its files is
    made."""
    old_blank, new = blank_model(old.config), blank_model(new_config)
    layers = layer_sources(old_blank, new, _layer_types(old.config), _layer_types(new_config))
    new_shapes, old_shapes = shapes_of(new), shapes_of(old_blank)
    tied = dict(new.all_tied_weights_keys or {})
    sources = {name: _old_name(name, layers) for name in new_shapes}
    missing = sorted(set(sources.values()) - old_shapes.keys())
    if missing:
        raise ModelError(
            f"the old model has no {missing[0]}",
            where=new_config.model_type,
            hint="sizes that are equal must stay equal (embedding_size), and those of parts must fit theirs",
        )
    aligned = {name: old_shapes[source] for name, source in sources.items()}
    order = list(layer_depths(old_blank))
    numbers = torch.tensor([order.index(source.prefix) for source in layers.values()])
    growth = Growth(old.config, new_config, numbers, _position_shift(old.config, new_config))
    axes, vocabulary = find_axes(growth, aligned, new_shapes)
    recipes = {
        name: Recipe(name, sources[name], {axis: found for (weight, axis), found in axes.items() if weight == name})
        for name in new_shapes
        if name not in tied
    }
    for name, axis in vocabulary:
        if name in recipes:
            recipes[name].vocabulary = axis
    if exact:
        _keep_function(old, new, recipes, layers)
    return new, layers, [(recipe, new_shapes[name]) for name, recipe in recipes.items()]


def _keep_function(old: Any, new: Any, recipes: dict[str, Recipe], layers: dict[str, LayerSource]) -> None:
    """What `cloze.tools.grow.exact` says: shares for what reads copies, zeros at the end of layers that came in
    addition."""
    check_possible(heads_of(old.config), heads_of(new.config))
    for name, recipe in recipes.items():
        module = new.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Linear) and 1 in recipe.axes:
            recipe.scale[1] = shares(recipe.axes[1])
        source = next((layers[prefix] for prefix in layers if name.startswith(prefix)), None)
        recipe.zero = source is not None and source.again and LAST.search(name) is not None
    decoder = next((n for n, m in new.named_modules() if m is new.get_output_embeddings()), None)
    kept = (new.all_tied_weights_keys or {}).get(f"{decoder}.weight")
    if kept is not None and 1 in recipes[kept].axes:
        for name in before_decoder(old):
            if 0 in recipes[name].axes:
                recipes[name].scale[0] = shares(recipes[name].axes[0])


def _old_name(name: str, layers: dict[str, LayerSource]) -> str:
    for prefix, source in layers.items():
        if name.startswith(prefix):
            return source.prefix + name.removeprefix(prefix)
    return name


def _layer_types(config: PretrainedConfig) -> list[str]:
    return list(getattr(config.get_text_config(), "layer_types", None) or [])


def _position_shift(old: PretrainedConfig, new: PretrainedConfig) -> int:
    """Return how many rows later the first position begins in the new position table."""
    if new.model_type not in POSITIONS_AFTER_PADDING:
        return 0
    return _padding(new.get_text_config()) - _padding(old.get_text_config())


def _padding(config: PretrainedConfig) -> int:
    return getattr(config, "pad_token_id", None) or 0


def _stored(
    recipe: Recipe, tensors: dict[str, torch.Tensor], rows: Rows | None, shape: tuple[int, ...], where: object
) -> Stored:
    def pieces() -> Iterator[tuple[int, torch.Tensor]]:
        made = recipe.make(tensors, rows)
        if tuple(made.shape) != shape:
            raise ModelError(
                f"{recipe.name} would have shape {tuple(made.shape)}, not {shape}",
                where=where,
                hint="this architecture keeps the tensor in another layout: train it from scratch",
            )
        yield 0, made.reshape(-1)

    return Stored(recipe.name, shape, tensors[recipe.old_name].dtype, pieces, where)


def _note(
    config: GrowConfig, changes: dict[str, tuple[int, int]], rows: Rows | None, layers: dict[str, LayerSource]
) -> dict[str, Any]:
    """Return the sources of the folder for its grown.json, without paths of this machine."""
    named = {name: getattr(config, name) for name in ("source", "tokenizer", "config_name", "config_overrides")}
    moved = {prefix: one.prefix for prefix, one in layers.items() if prefix != one.prefix}
    return {
        **basename_paths({name: value for name, value in named.items() if value is not None}),
        "method": config.method,
        "changed": {name: list(both) for name, both in changes.items()},
        "tokens": dict(rows.kinds) if rows else None,
        "layers": {prefix.rstrip("."): source.rstrip(".") for prefix, source in moved.items()},
        "versions": versions_of(("cloze", "torch", "transformers", "tokenizers")),
    }
