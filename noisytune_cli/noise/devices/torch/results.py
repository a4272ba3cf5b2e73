"""Results of devices on their way to the host: copied once they are there, waited for when they are read.

What a device is given to do after them is not waited for, so that it works on while Python reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

#: Rows of results on a device, and the indices of the parts that they belong to.
Queued = tuple[Sequence[int], Tensor]

#: The same on their way: what waits for the rows and returns them.
Sent = tuple[Sequence[int], Callable[[], list[list[float]]]]


def send(queued: Iterable[Queued]) -> list[Sent]:
    """Send all results to the host, those of each device at once."""
    by_device: dict[torch.device, list[Queued]] = {}
    for indices, rows in queued:
        by_device.setdefault(rows.device, []).append((indices, rows))
    sent: list[Sent] = []
    for results in by_device.values():
        order = [i for indices, _ in results for i in indices]
        sent.append((order, send_to_host(torch.cat([rows for _, rows in results]))))
    return sent


def fetch(sent: Sequence[Sent]) -> Iterator[tuple[int, list[float]]]:
    """Yield each index with its row of the results, waiting for each device once."""
    for order, rows in sent:
        yield from zip(order, rows(), strict=True)


def send_to_host(rows: Tensor) -> Callable[[], list[list[float]]]:
    """Begin to copy rows to the host; return what waits for them and returns them."""
    if rows.device.type != "cuda":
        return rows.tolist
    with torch.cuda.device(rows.device):
        # Into pinned memory, which torch takes for such a copy.
        host, arrived = rows.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

    def wait() -> list[list[float]]:
        arrived.synchronize()
        found: list[list[float]] = host.tolist()
        return found

    return wait
