"""Another program's checkpoint is called by its name, with what can be done with it here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloze.checkpoint.format import find_checkpoint, list_checkpoints, own_checkpoints, read_manifest
from cloze.config import TrainConfig
from cloze.errors import CheckpointError, ClozeError
from cloze.training.checkpointing.restore import choose_checkpoint
from cloze.training.run_dir import open_run_folder
from cloze.utils.foreign.folders import foreign_owner

TRAINER = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
OTHERS = {
    "Trainer": (TRAINER, "transformers' Trainer", "--model_name_or_path {folder} in place of resuming"),
    "Trainer with DeepSpeed": (
        ("trainer_state.json", "latest", "global_step9/mp_rank_00_model_states.pt"),
        "transformers' Trainer",
        "cloze consolidate {folder}",
    ),
    "accelerate": (("model.safetensors", "optimizer.bin", "random_states_0.pkl"), "accelerate", "with config.json"),
    "DeepSpeed": (("zero_pp_rank_0_mp_rank_00_optim_states.pt",), "DeepSpeed", "cloze consolidate {folder}"),
    "FSDP": (("pytorch_model_fsdp_0/.metadata",), "torch.distributed", "cloze consolidate {folder}"),
    "PEFT": (("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter", "merge_and_unload()"),
    "a model": (("config.json", "model.safetensors"), "a model without the state", "--model_name_or_path {folder}"),
}


def make(folder: Path, names: tuple[str, ...]) -> Path:
    """Make empty files: only names are looked at."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("whose", OTHERS)
def test_resuming_from_it_says_whose_it_is_and_what_to_do(tmp_path: Path, whose: str):
    names, what, hint = OTHERS[whose]
    folder = make(tmp_path / "old" / "checkpoint-500", names)
    for refused in (
        lambda: read_manifest(folder),
        lambda: choose_checkpoint(tmp_path, str(folder), 0, 1),
        lambda: choose_checkpoint(tmp_path / "old", "auto", 0, 1),
        lambda: find_checkpoint(tmp_path / "old"),
        lambda: open_run_folder(TrainConfig(output_dir=str(tmp_path / "old")), {}, {}),
        lambda: read_manifest(tmp_path / "old"),
    ):
        with pytest.raises(ClozeError) as caught:
            refused()
        assert what in str(caught.value)
        assert hint.format(folder=folder) in str(caught.value) or folder.name not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "resume_from_checkpoint" not in str(caught.value)


def test_folders_of_ours_are_not_taken_for_others(tmp_path: Path):
    own = make(tmp_path / "checkpoint-10", ("checkpoint.json", "model/config.json", "rank-0.safetensors"))
    assert foreign_owner(own) is None
    assert foreign_owner(tmp_path) is None
    assert foreign_owner(tmp_path / "nowhere") is None
    make(tmp_path / "checkpoint-500", TRAINER)
    assert own_checkpoints(tmp_path) == [own]
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-500"


def test_a_damaged_checkpoint_is_no_other_programs(tmp_path: Path):
    folder = make(tmp_path / "checkpoint-7", ("rank-0.safetensors",))
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json; .*checkpoint-N"):
        read_manifest(folder)
    assert own_checkpoints(tmp_path) == [folder]
