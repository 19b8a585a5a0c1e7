"""Transfers of nested structures: what arrives, and what is left as it is."""

from dataclasses import dataclass

import pytest
import torch

from gtc_dist.distributed.device_transfer import AsyncTransfer, pack, to_device, unpacked

META = torch.device("meta")


@dataclass
class Part:
    rows: torch.Tensor | None
    counts: list[int]


@dataclass
class Whole:
    parts: list[Part]
    named: dict[str, torch.Tensor]
    note: str


def test_a_packed_buffer_holds_every_tensor():
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 5, generator=generator),
        torch.randn(7, generator=generator).half(),
        torch.arange(9).view(3, 3).T,  # not contiguous
        torch.tensor([True, False, True]),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor(3.5, dtype=torch.float64),
    ]
    buffer, places = pack(tensors, pinned=False)
    assert all(place % 128 == 0 for place in places)
    for tensor, place in zip(tensors, places, strict=True):
        got = unpacked(buffer, place, tensor)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


def test_all_tensors_are_moved_and_shared_parts_stay_shared():
    shared = Part(torch.ones(3), [1])
    there = torch.ones(2, device=META)
    whole = Whole([shared, shared, Part(None, [])], {"a": shared.rows, "b": there}, "x")
    moved = to_device(whole, META)
    assert moved.parts[0] is moved.parts[1]
    assert moved.parts[0].rows is moved.named["a"]
    assert moved.parts[0].rows.device == META
    assert moved.parts[0].rows.shape == (3,)
    assert moved.named["b"] is there
    assert (moved.parts[0].counts, moved.parts[2], moved.note) == ([1], Part(None, []), "x")
    assert shared.rows.device.type == "cpu"


def test_a_value_that_is_there_is_not_copied():
    whole = Whole([Part(torch.ones(3), [1])], {}, "x")
    transfer = AsyncTransfer(torch.device("cpu"))
    assert transfer.finish(transfer.start(whole)) is whole


@pytest.mark.parametrize("value", [None, 3, [], {}, "text", [1, [2]]])
def test_values_without_a_tensor_are_returned(value):
    assert to_device(value, META) is value
