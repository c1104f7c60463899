"""GPUs that can be rented or bought, and this machine's own.

    gpu, count = parse_gpus("8xH100-80GB")     # (Gpu(name="H100-80GB", ...), 8)

Figures are those of NVIDIA's data sheets and architecture white papers of each product (V100, T4, A10, A30, A40,
A100, L4, L40, L40S, H100, H100 NVL, H200, GH200, DGX B200, GB200; GeForce RTX 3090, 4090, 5090; RTX A6000, RTX 6000
Ada); of the A10G, which has none, AWS's page on its G5 instances. Peaks stand in `cloze.model.flops.PEAK_TFLOPS` and
nowhere else.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from cloze.errors import ConfigError
from cloze.model.flops import PEAK_TFLOPS, device_peak
from cloze.utils.memory import free_memory


@dataclass(frozen=True)
class Gpu:
    """One device. `memory`: bytes that can be used; `peak`: FLOP/s of dense half-precision products, None where it is
    not known; `hbm`, `link`, `pcie`: bytes per second of its memory, to its neighbours of one node (one way), and to
    the host (one way); `half`: the 16-bit type it is fast in, "no" for a CPU."""

    name: str
    memory: int
    peak: float | None
    hbm: float
    link: float
    pcie: float
    half: str = "bf16"

    @property
    def is_gpu(self) -> bool:
        """Return whether it is a GPU; else host memory and device memory are one."""
        return self.half != "no"


# name: key of PEAK_TFLOPS, GB of memory, GB/s of it, GB/s of NVLink one way (0: none, or a bridge of two cards, which
# is left out), GB/s of PCIe one way. A data sheet's GB is read as 10^9 bytes: that is 5 to 7 % less than what the
# chips hold, and about what ECC, the driver and the CUDA context take of it.
_SHEET = {
    "V100-16GB": ("V100", 16, 900, 150, 16), "V100-32GB": ("V100", 32, 900, 150, 16),
    "V100-PCIE-16GB": ("V100 PCIE", 16, 900, 0, 16), "T4": ("T4", 16, 320, 0, 16),
    "A10": ("A10", 24, 600, 0, 32), "A10G": ("A10G", 24, 600, 0, 32), "A30": ("A30", 24, 933, 0, 32),
    "A40": ("A40", 48, 696, 0, 32), "A6000": ("RTX A6000", 48, 768, 0, 32),
    "A100-40GB": ("A100", 40, 1555, 300, 32), "A100-80GB": ("A100", 80, 2039, 300, 32),
    "A100-PCIE-80GB": ("A100", 80, 1935, 0, 32), "L4": ("L4", 24, 300, 0, 32), "L40": ("L40", 48, 864, 0, 32),
    "L40S": ("L40S", 48, 864, 0, 32), "RTX-6000-Ada": ("RTX 6000 Ada", 48, 960, 0, 32),
    "RTX-3090": ("RTX 3090", 24, 936, 0, 32), "RTX-4090": ("RTX 4090", 24, 1008, 0, 32),
    "RTX-5090": ("RTX 5090", 32, 1792, 0, 64), "H100-80GB": ("H100", 80, 3350, 450, 64),
    "H100-PCIE-80GB": ("H100 PCIe", 80, 2000, 0, 64), "H100-NVL": ("H100 NVL", 94, 3900, 0, 64),
    "H20": ("H20", 96, 4000, 450, 64), "H200": ("H200", 141, 4800, 450, 64),
    "H200-NVL": ("H200 NVL", 141, 4800, 0, 64), "GH200": ("GH200", 96, 4000, 450, 450),
    "B200": ("B200", 180, 8000, 900, 64), "GB200": ("GB200", 186, 8000, 900, 450),
}  # fmt: skip
_NO_BF16 = ("V100", "T4")
_USUAL = {"V100": "V100-16GB", "A100": "A100-80GB", "H100": "H100-80GB", "3090": "RTX-3090", "4090": "RTX-4090",
          "5090": "RTX-5090", "RTXA6000": "A6000", "H100SXM": "H100-80GB", "H10080GBSXM": "H100-80GB",
          "H100PCIE": "H100-PCIE-80GB", "A10080GBSXM": "A100-80GB", "A10040GBSXM": "A100-40GB"}  # fmt: skip


def _catalogue() -> dict[str, Gpu]:
    found = {}
    for name, (key, memory, hbm, nvlink, pcie) in _SHEET.items():
        half = "fp16" if key.split()[0] in _NO_BF16 else "bf16"
        link = (nvlink or pcie) * 1e9
        found[name] = Gpu(name, memory * 10**9, PEAK_TFLOPS[key] * 1e12, hbm * 1e9, link, pcie * 1e9, half)
    return found


GPUS = _catalogue()


def parse_gpus(text: str) -> tuple[Gpu, int]:
    """Parse `8xH100-80GB` into the GPU and the number per node, 1 if none is given. The spelling is lenient:
    `h100`, `A100 80GB` and `rtx4090` do. Raises ConfigError with near matches."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x*]\s*)?(\S.*?)\s*", text, re.IGNORECASE)
    where = f"--gpus {text}"
    if match is None or match.group(1) == "0":
        raise ConfigError("not a number of GPUs", where=where, hint="write 8xH100-80GB, or A10G")
    wanted = _plain(match.group(2))
    known = {_plain(name): name for name in GPUS} | {_plain(short): name for short, name in _USUAL.items()}
    if wanted not in known:
        close = [known[name] for name in difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)]
        hint = f"near to it: {', '.join(dict.fromkeys(close))}" if close else f"known are: {', '.join(GPUS)}"
        raise ConfigError(f"no GPU {match.group(2)} is known here", where=where, hint=hint)
    return GPUS[known[wanted]], int(match.group(1) or 1)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper()).removeprefix("NVIDIA")


def this_machine() -> tuple[Gpu, int]:
    """Return the GPUs that torch finds here, taken to be of one kind; or the CPU, one process, with the memory that is
    free.

    Of a GPU that is not in the catalogue only memory and peak are known: its links are taken for PCIe 4.0's.
    """
    if not torch.cuda.is_available():
        return Gpu("this CPU", free_memory(), None, 0.0, 0.0, 0.0, "no"), 1
    properties = torch.cuda.get_device_properties(0)
    name, count = properties.name, torch.cuda.device_count()
    half = "bf16" if torch.cuda.get_device_capability(0) >= (8, 0) else "fp16"
    alike = [gpu for gpu in GPUS.values() if gpu.peak == device_peak(name)]
    on_pcie = "PCI" in name.upper()
    near = sorted(alike, key=lambda gpu: (abs(gpu.memory - properties.total_memory), ("PCI" in gpu.name) != on_pcie))
    like = near[0] if near else None
    hbm, link, pcie = (like.hbm, like.link, like.pcie) if like else (5e11, 32e9, 32e9)
    return Gpu(name, properties.total_memory, device_peak(name), hbm, link, pcie, half), count
