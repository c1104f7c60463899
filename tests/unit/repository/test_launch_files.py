"""Every shipped file that is to be launched can be: scripts parse, configurations are accepted by their readers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.runtime.config import DeepSpeedConfig
from packaging.requirements import Requirement
from repository import ROOT

from cloze.config.parser import parse
from cloze.errors import ConfigError

COMMANDS = [ROOT / "launch/demo", ROOT / "launch/test", ROOT / "launch/test_lowest", ROOT / ".ci/run"]
COMMANDS += [ROOT / "slurm/submit", ROOT / "launch/multi_node"]
SOURCED = [ROOT / "launch/env.sh", ROOT / "slurm/common.sh", ROOT / "slurm/site.env.example"]
SCRIPTS = [*COMMANDS, *SOURCED, *sorted(ROOT.glob("slurm/*.sbatch"))]
ACCELERATE_CONFIGS = sorted(ROOT.glob("launch/accelerate/*.yaml"))
DS_CONFIGS = sorted(ROOT.glob("ds_configs/*.json"))
RECIPES = sorted(ROOT.glob("launch/recipes/*.yaml"))
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3, "zero3_nvme": 3}


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def test_everything_that_is_promised_is_there():
    accelerate = {"cpu", "single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "zero3_offload", "multi_node", "fsdp2"}
    assert {path.stem for path in ACCELERATE_CONFIGS} >= accelerate
    assert {path.stem for path in DS_CONFIGS} == set(STAGES)
    assert {path.stem for path in ROOT.glob("slurm/*.sbatch")} >= {"prepare", "train", "evaluate", "push"}
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@named(SCRIPTS)
def test_bash_parses(path: Path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@named(SCRIPTS)
def test_shellcheck_finds_nothing(path: Path):
    words = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", "--severity=warning"]
    words += ["--exclude=SC2065", str(path)]  # takes `exec launch/test <file` for a comparison
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


@named(COMMANDS)
def test_commands_are_executable_and_stop_at_the_first_error(path: Path):
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


@named(sorted(ROOT.glob("slurm/*.sbatch")))
def test_batch_scripts_say_how_to_submit_them_and_stop_without_a_recipe(path: Path):
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n")
    header, _, body = text.partition("set -euo pipefail")
    assert f"slurm/{path.name}" in header
    assert "#SBATCH --nodes=" in header
    assert "#SBATCH" not in body, "sbatch reads no #SBATCH line after the first command"
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode != 0
    assert re.search(rf"usage: sbatch (--\S+ )?slurm/{path.name} \w", done.stderr)


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, []),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}, ["--num_shards", "16", "--shard_index", "3"]),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "NUM_SHARDS": "16"},
            ["--num_shards", "16", "--shard_index", "7"],
        ),
    ],
    ids=["no array", "array", "one task again"],
)
def test_an_array_task_prepares_its_share(tmp_path: Path, environment: dict[str, str], share: list[str]):
    """`srun` is a stand-in that prints what it would start; the cluster's tests run the real one."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    recipe = ROOT / "launch/recipes/roberta-eli5-full.prepare.yaml"
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "6"}
    words = ["bash", str(ROOT / "slurm/prepare.sbatch"), str(recipe), "--output", "here"]
    done = subprocess.run(words, env=env | environment, capture_output=True, text=True, check=True)
    started = done.stdout.splitlines()
    assert started[:3] == ["--ntasks=1", "cloze", "prepare"]
    name, config = parse(started[2:])
    assert (name, config.output, config.num_proc, config.block_size) == ("prepare", "here", 6, 128)
    expected = dict(zip(share[::2], share[1::2], strict=True))
    assert config.num_shards == int(expected.get("--num_shards", 1))
    assert config.shard_index == (int(expected["--shard_index"]) if expected else None)


@named(ACCELERATE_CONFIGS)
def test_accelerate_reads_its_configurations(path: Path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.use_cpu is False, "under use_cpu accelerate drops DeepSpeed or starts one process"
    assert config.num_processes >= 1
    if config.distributed_type == DistributedType.DEEPSPEED:
        settings = config.deepspeed_config
        assert (ROOT / settings["deepspeed_config_file"]).is_file()
        assert settings["zero3_init_flag"] is False
        assert config.to_dict().get("mixed_precision") is None, "accelerate refuses it beside a DeepSpeed file"
    if config.distributed_type == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if config.num_machines > 1:
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
        assert config.rdzv_backend == "static"


@named([path for path in ACCELERATE_CONFIGS if path.stem.startswith("zero")])
def test_a_zero_configuration_names_the_deepspeed_file_of_its_own_name(path: Path):
    config = load_config_from_file(str(path))
    assert config.deepspeed_config["deepspeed_config_file"] == f"ds_configs/{path.stem}.json"


@named(DS_CONFIGS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_deepspeed_reads_its_configurations_once_accelerate_has_filled_them(path: Path, precision: str):
    plugin = DeepSpeedPlugin(hf_ds_config=str(path))
    plugin.set_mixed_precision(precision)
    plugin.deepspeed_config_process(
        must_match=False,
        **{
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization.reduce_bucket_size": 768 * 768,
            "zero_optimization.stage3_prefetch_bucket_size": 500_000,
            "zero_optimization.stage3_param_persistence_threshold": 7680,
        },
    )
    filled = plugin.deepspeed_config
    assert "auto" not in json.dumps(filled)
    assert not {"optimizer", "scheduler"} & set(filled), "Cloze has its own"
    config = DeepSpeedConfig({**filled, "steps_per_print": 1})
    assert config.zero_config.stage == STAGES[path.stem]
    assert config.zero_allow_untested_optimizer
    assert config.bfloat16_config.enabled == (precision == "bf16")
    assert config.float16_config.enabled == (precision == "fp16")
    device = path.stem.partition("_")[2].replace("offload", "cpu")
    offload = config.zero_config.offload_optimizer
    assert (offload.device if offload else "") == device
    if device:
        assert filled["zero_force_ds_cpu_optimizer"] is False


@named(DS_CONFIGS)
def test_deepspeed_knows_every_key(path: Path):
    runtime = Path(deepspeed.__file__).parent / "runtime"  # DeepSpeed ignores unknown keys at the top level
    files = ["config.py", "constants.py", "precision_config.py", "swap_tensor/constants.py", "zero/config.py"]
    sources = "".join((runtime / name).read_text() for name in files)
    known = set(re.findall(r"""["']([a-z0-9_]+)["']""", sources))
    assert set(json.loads(path.read_text())) <= known


def command_of(recipe: Path) -> str:
    return recipe.stem.partition(".")[2] or "train"


@named(RECIPES)
def test_recipes_are_complete_and_hold_known_keys_only(path: Path, tmp_path: Path):
    command = command_of(path)
    name, config = parse([command, "--config", str(path)])
    assert name == command
    values = yaml.safe_load(path.read_text())
    assert {key: getattr(config, key) for key in values} == values
    misspelt = tmp_path / "recipe.yaml"
    misspelt.write_text(path.read_text() + "no_such_key: 1\n")
    with pytest.raises(ConfigError, match="no_such_key"):
        parse([command, "--config", str(misspelt)])


@named([path for path in RECIPES if command_of(path) == "train"])
def test_a_training_recipe_reads_what_its_prepare_recipe_writes(path: Path):
    prepare = path.with_suffix(".prepare.yaml")
    _, prepared = parse(["prepare", "--config", str(prepare)])
    _, config = parse(["train", "--config", str(path)])
    assert config.dataset_name == prepared.output
    if path.stem in ("distilroberta-eli5", "roberta-eli5-full"):  # they begin with a published model
        assert prepared.tokenizer_name == config.model_name_or_path
    hints = [line for line in prepare.read_text().splitlines() if line.startswith("#  ")]
    assert any(f"launch/recipes/{prepare.name}" in line for line in hints), "it says how to run it"


@named([path for path in RECIPES if command_of(path) == "train"])
def test_a_training_recipe_says_how_to_run_it_and_where_its_values_are_from(path: Path):
    header = path.read_text().partition("\nmodel_")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"launch/recipes/{path.name}" in header
    assert re.search(
        r"et al\. \d{4}, \"|The masked language modeling tutorial of transformers", header.replace("\n# ", " ")
    )
    for file in re.findall(r"(?:launch|ds_configs|slurm)/[\w./-]+\w", header):
        assert (ROOT / file).exists(), file


def test_a_recipe_can_be_trained_from_random_weights():
    recipe = str(ROOT / "launch/recipes/distilroberta-eli5.yaml")
    scratch = ["--model_name_or_path", "null", "--config_name", "some/folder"]
    _, config = parse(["train", "--config", recipe, *scratch, "--config_overrides", "num_hidden_layers=6"])
    assert (config.model_name_or_path, config.config_name) == (None, "some/folder")
    assert config.config_overrides == "num_hidden_layers=6"


def test_the_tutorials_recipe_has_the_tutorials_values():
    _, config = parse(["train", "--config", str(ROOT / "launch/recipes/distilroberta-eli5.yaml")])
    assert (config.model_name_or_path, config.learning_rate) == ("distilbert/distilroberta-base", 2e-5)
    assert (config.num_train_epochs, config.weight_decay, config.mlm_probability) == (3, 0.01, 0.15)
    assert (config.per_device_train_batch_size, config.eval_strategy) == (8, "epoch")
    _, prepared = parse(["prepare", "--config", str(ROOT / "launch/recipes/distilroberta-eli5.prepare.yaml")])
    assert (prepared.split, prepared.text_field, prepared.block_size) == ("train[:5000]", "answers.text", 128)
    assert prepared.validation_split_percentage == 20


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(pin.name): pin for pin in pins}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_direct_dependency_to_a_version_it_allows():
    pins = constraints()
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for needed in map(Requirement, needs):
        pin = pins[canonical(needed.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in needed.specifier, f"{pin} is not {needed}"


def test_constraints_leave_the_build_of_torch_to_the_machine():
    assert all("+" not in str(pin) and pin.url is None for pin in constraints().values())
