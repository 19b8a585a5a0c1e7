"""Short parts, so that a few items fill several."""

import pytest

from gtc_dist.features import encode_items


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(encode_items, "PART_ITEMS", {"text": 16, "picture": 16})
