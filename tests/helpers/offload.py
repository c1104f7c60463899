"""DeepSpeed configurations that offload."""

from __future__ import annotations

import json
from pathlib import Path

from ranks import compile_async_io
from repository import ROOT


def settings(name: str, folder: Path, sub_group_size: int = 1_000_000) -> str:
    """A shipped configuration; on the disk, everything that can be there."""
    found = json.loads((ROOT / "ds_configs" / f"{name.removesuffix('_hpz')}.json").read_text())
    zero = found["zero_optimization"]
    if name.endswith("_hpz"):
        zero["zero_hpz_partition_size"] = 2
    if name == "zero3_nvme":
        compile_async_io()
        zero["sub_group_size"] = sub_group_size
        zero["offload_optimizer"] |= {"nvme_path": str(folder / "disk")}
        zero["offload_param"] |= {"nvme_path": str(folder / "disk"), "buffer_size": 1_200_000}
        zero["offload_param"]["max_in_cpu"] = 0
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    path = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return str(path)
