"""A long and bad cable: takes Ethernet frames from each of two interfaces to the other, later, and not all of them.

    python slow_cable.py one other --delay 0.005 --loss 0.01

In user space, and not with `tc netem`, which many kernels come without.
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import socket
import time

ETH_P_ALL = 3
PACKET_OUTGOING = 4  # linux/if_packet.h: what this machine sends itself is seen too


def carry(names: tuple[str, str], delay: float, loss: float) -> None:
    """Forward frames for ever. `delay`: seconds in each direction; `loss`: share of frames that get lost."""
    ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) for _ in names]
    for end, name in zip(ends, names, strict=True):
        end.bind((name, 0))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    luck = random.Random(0)
    on_the_way: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0
    print("ready", flush=True)
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for end in select.select(ends, [], [], wait)[0]:
            frame, about = end.recvfrom(65535)
            if about[2] != PACKET_OUTGOING and luck.random() >= loss:
                number += 1
                heapq.heappush(on_the_way, (time.monotonic() + delay, number, ends[1 - ends.index(end)], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(on_the_way)
            end.send(frame)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ends", nargs=2)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    given = parser.parse_args()
    carry(tuple(given.ends), given.delay, given.loss)
