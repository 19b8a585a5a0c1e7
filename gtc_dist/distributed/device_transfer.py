"""Copies of nested structures to a device, in one transfer, beside the computation.

A batch holds some dozens of small tensors. Copied one by one from pageable memory, each stops the host until it has
arrived. Here they are packed into one pinned buffer, which one copy on a stream of its own brings to the GPU while the
step before still computes; the tensors there are views of the buffer that arrived.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch

T = TypeVar("T")
ALIGNMENT = 128  # bytes at which each tensor starts


def to_device(value: T, device: torch.device) -> T:
    """The value with all its tensors on the device. The host waits for the copy.

    Args:
        value: nested dataclasses, lists, tuples and dictionaries. A part that occurs twice is one part afterwards, too.
            Tensors that are on the device already, and all else, stay as they are.
    """
    transfer = AsyncTransfer(device)
    moved = transfer.start(value)
    if moved.arrived is not None:
        moved.arrived.synchronize()
    return transfer.finish(moved)


@dataclass
class Transfer:
    """A value on its way to the device."""

    value: object
    resident: list[torch.Tensor]  # memory on a GPU that the value refers to
    arrived: torch.cuda.Event | None  # None: it is there


class AsyncTransfer:
    """Sends values to a device; the host does not wait. One thread starts transfers, another may finish them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """In this context the thread's kernels run on the transfers' stream: for parts of a value that are made on the
        device before its transfer starts."""
        if self.stream is None:
            yield
            return
        torch.cuda.set_device(self.device)  # of this thread; otherwise it would open a context on the first GPU
        with torch.cuda.stream(self.stream):
            yield

    def start(self, value: T) -> Transfer:
        """Queue the copy of a value."""
        found: dict[int, torch.Tensor] = {}
        there: dict[int, torch.Tensor] = {}
        _collect(value, self.device, found, there)
        packed, places = pack(list(found.values()), pinned=self.stream is not None)
        with self.beside():
            buffer, arrived = packed.to(self.device, non_blocking=self.stream is not None), None
            if self.stream is not None:
                arrived = torch.cuda.Event()
                arrived.record()
        views = [unpacked(buffer, place, tensor) for place, tensor in zip(places, found.values(), strict=True)]
        copies = dict(zip(found, views, strict=True))
        return Transfer(_rebuilt(value, copies, {}), [buffer, *there.values()], arrived)

    def finish(self, transfer: Transfer):
        """The value, for the kernels that this thread queues from now on, which wait for it on the device."""
        if transfer.arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(transfer.arrived)
            for tensor in transfer.resident:
                tensor.record_stream(stream)  # its memory is not used again before they are done
        return transfer.value


def pack(tensors: list[torch.Tensor], pinned: bool) -> tuple[torch.Tensor, list[int]]:
    """All tensors in one buffer on the host, uint8, and the byte at which each starts."""
    places, size = [], 0
    for tensor in tensors:
        places.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for place, tensor in zip(places, tensors, strict=True):
        unpacked(buffer, place, tensor).copy_(tensor)
    return buffer, places


def unpacked(buffer: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
    """The view of a tensor of this type and shape that starts at byte `place` of the buffer."""
    size = like.numel() * like.element_size()
    return buffer[place : place + size].view(like.dtype).view(like.shape)


def _parts(value) -> list:
    """Parts of a dataclass, list, tuple or dictionary; no parts of anything else."""
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else []


def _collect(value, device: torch.device, found: dict[int, torch.Tensor], there: dict[int, torch.Tensor]) -> None:
    """Add the tensors that are not on the device, and those that are, by id."""
    if isinstance(value, torch.Tensor):
        (there if value.device == device else found)[id(value)] = value
        return
    for part in _parts(value):
        _collect(part, device, found, there)


def _rebuilt(value, copies: dict[int, torch.Tensor], done: dict[int, object]):
    """The value with the copies in place of their originals; parts without any are kept."""
    if isinstance(value, torch.Tensor):
        return copies.get(id(value), value)
    parts = _parts(value)
    if not parts:
        return value
    if id(value) not in done:
        new = [_rebuilt(part, copies, done) for part in parts]
        if all(a is b for a, b in zip(parts, new, strict=True)):
            done[id(value)] = value
        elif is_dataclass(value):
            done[id(value)] = replace(value, **dict(zip((f.name for f in fields(value)), new, strict=True)))
        elif isinstance(value, dict):
            done[id(value)] = dict(zip(value, new, strict=True))
        else:
            done[id(value)] = type(value)(new)
    return done[id(value)]
