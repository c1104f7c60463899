"""Make the kernel cut what it sends through an interface into frames itself, with checksums, as a cable needs it.

python whole_frames.py eth0        # what `ethtool -K eth0 tx off tso off gso off` does
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import sys

SIOCETHTOOL = 0x8946
SWITCHES = {"tso": 0x1F, "gso": 0x24, "tx": 0x17}  # linux/ethtool.h: ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_STXCSUM


def switch_off(interface: str) -> None:
    """Leave segmentation and checksums to no device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for number in SWITCHES.values():
            value = array.array("B", struct.pack("II", number, 0))
            address, _ = value.buffer_info()
            fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP", interface.encode(), address))


if __name__ == "__main__":
    switch_off(sys.argv[1])
