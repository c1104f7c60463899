"""torch's TF32 switches, of which it has two interfaces, are set and restored whichever of them was used before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, succeed

from cloze.tools.api.process_state import preserve_process_state
from cloze.utils.system import set_tf32

PLACES = ("fp32_precision", "cuda.matmul.fp32_precision", "cudnn.fp32_precision", "cudnn.conv.fp32_precision")
USED = ["cuda.matmul.fp32_precision='tf32'", "fp32_precision='tf32'", "cudnn.conv.fp32_precision='ieee'"]
USED += ["cuda.matmul.allow_tf32=True", "cudnn.allow_tf32=False", "mkldnn.matmul.fp32_precision='ieee'"]


def shown() -> list[str]:
    """What a process sees of both interfaces."""
    found = [str(eval(f"torch.backends.{place}")) for place in (*PLACES, "cudnn.rnn.fp32_precision")]
    for place in ("cuda.matmul.allow_tf32", "cudnn.allow_tf32"):
        try:
            found.append(str(eval(f"torch.backends.{place}")))
        except RuntimeError:
            found.append("mixed")
    return found


def train_after(used: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    exec(f"torch.backends.{used}")
    before = shown()
    for on in (True, False):
        with preserve_process_state():
            set_tf32(on)
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is on
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is on
        for one, other in zip(before, shown(), strict=True):
            assert one in (other, "mixed"), (on, before, shown())


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one interface")
@pytest.mark.parametrize("used", USED)
def test_training_leaves_the_switches_as_they_were(tmp_path: Path, used: str):
    succeed(run_ranks(train_after, 1, tmp_path / "log", used=used))
