"""Build or load the model of a run, before its processes join.

    model, tokenizer = build_run_model(config, data)        # under ZeRO-3 in mapped files: see cloze.model.mapped

The weights are bit-identical for every engine: the code of transformers draws or loads them whole.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from cloze.checkpoint.format import list_checkpoints
from cloze.checkpoint.identity import base_folder
from cloze.config import TrainConfig
from cloze.data.train_data import TrainData
from cloze.errors import ModelError, error_phase
from cloze.model.load import build_model
from cloze.model.mapped import folder_for_weights, move_to_file, weights_in_files
from cloze.training.engines.choose_engine import requested_engine
from cloze.utils.terminal.console import warn


@error_phase("model")
def build_run_model(config: TrainConfig, data: TrainData) -> tuple[Any, Any]:
    """Return the model in fp32 on the CPU and its tokenizer, as `build_model` makes them; under ZeRO-3 its weights lie
    in mapped files. Raises DiskError if these do not fit on the disk, ModelError if memory cannot hold a model."""
    try:
        return _build(config, data, None)
    except ModelError as error:
        stored = stored_config(config)
        if stored is None:
            raise
        warn(f"{error}; the model is made from {stored}, and its weights come from the checkpoint")
        return _build(config, data, stored)


def stored_config(config: TrainConfig) -> Path | None:
    """Return the model configuration of the checkpoint to resume if the base model is missing: the checkpoint has all
    weights. None if there is no such checkpoint."""
    if config.resume_from_checkpoint is None or config.model_name_or_path is None or base_folder(config) is not None:
        return None
    choice = Path(config.resume_from_checkpoint)
    found = list_checkpoints(Path(config.output_dir))[::-1] if config.resume_from_checkpoint == "auto" else [choice]
    return next((folder / "model" for folder in found if (folder / "model" / "config.json").is_file()), None)


def _build(config: TrainConfig, data: TrainData, stored: Path | None) -> tuple[Any, Any]:
    arguments = config, data.tokenizer, data.block_size, config.seed, stored
    if requested_engine(config.deepspeed).requested_support(config.deepspeed, "no").whole_model:
        try:
            return build_model(*arguments)
        except (MemoryError, RuntimeError) as error:  # torch has no class of its own for host memory
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            hint = "ZeRO-3 never holds it whole: launch/accelerate/zero3.yaml, ds_configs/zero3_nvme.json"
            what = "there is not enough memory for the whole model in each process"
            raise ModelError(what, where=config.model_name_or_path or config.model_type, hint=hint) from None
    folder = folder_for_weights(Path(config.output_dir))
    with weights_in_files(folder):
        model, tokenizer = build_model(*arguments)
    for parameter in model.parameters():  # copied modules have not registered their parameters
        move_to_file(parameter, folder)
    with contextlib.suppress(OSError):
        folder.rmdir()  # only if empty: an own folder of the run
    return model, tokenizer
