"""Arrays on disk: blocks, growing columns, buckets, and errors of a full disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError

QUICK = settings(deadline=None, max_examples=80)


def test_arrays_live_in_files_until_the_context_ends(tmp_path):
    with Scratch(str(tmp_path), memory_bytes=100) as scratch:
        array = scratch.array((5, 3), np.float32)
        assert (array == 0).all()
        assert Path(array.filename).parent.parent == tmp_path
        for block in scratch.blocks(5, 12 * 4):  # two rows at a time
            assert block.stop - block.start <= 2
            array[block] = block.start
        scratch.release()  # pages are released, contents stay
        assert array[:, 1].tolist() == [0, 0, 2, 2, 4]
        assert scratch.array((0, 3), np.int8).shape == (0, 3)
        other = scratch.array(4, np.int64)
        scratch.discard(other, None, np.zeros(3))
        assert len(list(scratch.path.iterdir())) == 1
        with pytest.raises(KeyError), Scratch(str(tmp_path)):
            raise KeyError
        assert list(tmp_path.iterdir()) == [scratch.path]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"prepare\.scratch .*none is not a folder"):
        Scratch(str(tmp_path / "none"))


@QUICK
@given(st.lists(st.lists(st.integers(-100, 100), max_size=5), max_size=5))
def test_a_growing_column_holds_the_appended_values(parts):
    with Scratch() as scratch:
        column = scratch.growing(np.int32)
        for part in parts:
            column.append(np.array(part, np.int64))
        assert column.rows == sum(map(len, parts))
        assert column.finish().tolist() == [value for part in parts for value in part]


@QUICK
@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 9), st.integers(0, 2))
def test_buckets_hold_their_rows_in_order(numbers, step, spare):
    bucket = np.array(numbers, np.int64)
    rows = np.arange(len(bucket), dtype=np.int32)
    vectors = np.stack([rows, -rows], axis=1).astype(np.float32)
    with Scratch() as scratch:
        buckets = Buckets(scratch, np.bincount(bucket, minlength=7) + spare, [np.int32, (np.float32, 2)])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            buckets.add(bucket[part], rows[part], vectors[part])
        for number in range(7):
            expected = np.flatnonzero(bucket == number)
            found, both = buckets.bucket(number)
            assert found.tolist() == expected.tolist()
            assert np.array_equal(both, vectors[expected])


FULL = """
import resource, signal, sys
import numpy as np
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with Scratch(sys.argv[1]) as scratch:
    column = scratch.growing(np.int8)
    for act in (lambda: scratch.array(1 << 20, np.float32), lambda: column.append(np.zeros(1 << 21, np.int8))):
        try:
            act()
        except InputError as error:
            print(error)
"""


def test_a_full_disk_gives_an_input_error(tmp_path):
    """In a process that cannot write files above 1 MB."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = found.stdout.splitlines()
    assert len(lines) == 2, found.stderr
    for line in lines:
        assert f"GB of intermediate data in {tmp_path} (File too large); name a larger disk in prepare.scratch" in line
