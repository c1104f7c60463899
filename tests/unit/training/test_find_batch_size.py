"""The largest micro-batch that fits is found with few trials, and they leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from corpus import TINY_MODEL
from ranks import cloze_ranks, succeed

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.training import find_batch_size
from cloze.training.engines.choose_engine import engine_for
from cloze.training.engines.ddp import DDPEngine

CURVES: dict[str, Callable[[int], float]] = {
    "a line": lambda n: 1000 + 100 * n,
    "gradients first, then activations": lambda n: max(1000 + n, 100 * n),
    "steeper and steeper": lambda n: 1000 + n**1.5,
    "in steps": lambda n: 1000 + 512 * (n // 4),
    "no cost at all": lambda n: 10,
}


@pytest.mark.parametrize("share", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("available", [1000, 1230, 2000, 10_000, 10**9])
@pytest.mark.parametrize("curve", CURVES)
def test_as_few_passes_as_memory_allows(curve: str, available: int, share: int):
    tried: list[int] = []

    def peak(blocks: int) -> int | None:
        tried.append(blocks)
        taken = int(CURVES[curve](blocks))
        return taken if taken <= available else None

    allowed = find_batch_size.SAFE_SHARE * available
    best = max((n for n in range(1, share + 1) if CURVES[curve](n) <= allowed), default=0)
    found = find_batch_size.most_blocks(peak, available, share)
    assert found <= best
    assert (found == 0) == (best == 0)
    assert best == 0 or -(-share // found) == -(-share // best)
    assert len(tried) <= 16
    good = 1
    for blocks in tried:  # never far beyond what is known to fit: on a CPU, the system would end the process
        assert blocks <= max(2, 4 * good)
        good = max(good, blocks) if CURVES[curve](blocks) <= allowed else good


def trial(prepared: Path, folder: Path, **values) -> find_batch_size.BatchProbe:
    from cloze.data.train_data import masking_rule, open_data
    from cloze.model.load import build_model
    from cloze.training.prepare_model import prepare_model

    config = TrainConfig(
        dataset_name=str(prepared),
        output_dir=str(folder),
        model_type="roberta",
        config_overrides="hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=256",
        auto_find_batch_size=True,
        **values,
    )
    data = open_data(config)
    model, _ = build_model(config, data.tokenizer, data.block_size, config.seed)
    head = prepare_model(model, config, data)
    engine = DDPEngine(Accelerator(cpu=True))
    masking = masking_rule(config, data.manifest, 1, None)
    return find_batch_size.BatchProbe(model, head, masking, data, config, engine)


def count(model: torch.nn.Module, _: object) -> None:
    model.calls += 1


def test_trials_leave_no_trace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = trial(prepared, tmp_path)
    one.model.register_buffer("calls", torch.zeros(1))
    one.model.register_forward_pre_hook(count)  # as a running mean would change
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    one.model.eval()
    torch.manual_seed(7)
    random = torch.get_rng_state()
    monkeypatch.setattr(find_batch_size, "_free", lambda device: 10**10)
    found = find_batch_size.fit_memory(find_batch_size.Layout(4, 4, 0, 1), one)
    assert (found.per_device, found.accumulation, found.global_batch) == (16, 1, 16)
    assert torch.equal(torch.get_rng_state(), random)
    assert not one.model.training
    assert all(p.grad is None for p in one.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())


def test_more_memory_is_needed_for_more_blocks_and_none_is_one_line(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = trial(prepared, tmp_path)
    one.run(64)
    small, large = find_batch_size.peak_bytes(one, 64), find_batch_size.peak_bytes(one, 256)
    assert small is not None
    assert large is not None
    assert 2 < large / small < 6
    monkeypatch.setattr(find_batch_size, "_free", lambda device: 1000)
    with pytest.raises(ConfigError, match="not even one block fits into memory"):
        find_batch_size.fit_memory(find_batch_size.Layout(4, 4, 0, 1), one)


@pytest.mark.parametrize(
    ("kind", "processes", "stage", "precision", "bytes_per_element"),
    [
        (DistributedType.NO, 1, None, "no", 8),
        (DistributedType.MULTI_GPU, 4, None, "bf16", 12),
        (DistributedType.DEEPSPEED, 4, 0, "bf16", 12),
        (DistributedType.DEEPSPEED, 4, 2, "bf16", 3),
        (DistributedType.DEEPSPEED, 4, 0, "no", 8),
        (DistributedType.DEEPSPEED, 4, 1, "no", 3),  # fp32 weights of its own in fp32 too
        (DistributedType.FSDP, 4, None, "bf16", 2),
        (DistributedType.DEEPSPEED, 4, 3, "no", 4),  # and the gradients
    ],
)
def test_room_is_kept_for_what_the_engine_will_hold(
    kind: DistributedType, processes: int, stage: int | None, precision: str, bytes_per_element: int
):
    model = torch.nn.Linear(100, 10, bias=True)
    model.bias.requires_grad = False
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        mixed_precision=precision,
        num_processes=processes,
        process_index=0,
        distributed_type=kind,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    share = processes if stage or kind == DistributedType.FSDP else 1
    for ema_decay, more in ((None, 0), (0.999, 4 // share)):
        one = SimpleNamespace(model=model, engine=engine_for(accelerator), config=SimpleNamespace(ema_decay=ema_decay))
        assert find_batch_size.bytes_to_come(one) == 1000 * (bytes_per_element + more)


def test_a_split_that_was_found_is_the_run_of_the_same_split_given_by_hand(prepared: Path, tmp_path: Path):
    """With dropout, which depends on the split: to the bit."""
    flags = ["train", *TINY_MODEL, "--max_steps", "2", "--save_steps", "2", "--dataset_name", str(prepared)]
    found, by_hand = tmp_path / "found", tmp_path / "hand"

    def room_for_36() -> None:
        find_batch_size._free, find_batch_size.bytes_to_come = lambda device: 4000, lambda trial: 0
        find_batch_size.peak_bytes = lambda trial, blocks: (trial.run(blocks), 100 * blocks)[1]

    split = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "32", "--auto_find_batch_size"]
    outcome = cloze_ranks([*flags, *split, "--output_dir", str(found)], 1, "single", tmp_path / "a", room_for_36)
    succeed(outcome)
    assert "1 x 32 x 4 (ranks x batch x accumulation) fit" in outcome[0].output
    split = ["--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "4"]
    succeed(cloze_ranks([*flags, *split, "--output_dir", str(by_hand)], 1, "single", tmp_path / "b"))
    for file in (found / "checkpoint-2").glob("*.safetensors"):
        assert file.read_bytes() == (by_hand / "checkpoint-2" / file.name).read_bytes(), file.name
