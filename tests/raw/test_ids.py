"""Ids of any type: codes, positions, common types."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.errors import InputError
from gtc_dist.raw import ids

QUICK = settings(deadline=None, max_examples=80)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "20", "-3", "0"], [1, 20, -3, 0]),
        (["1", "007"], ["1", "007"]),
        (["1", "+2"], ["1", "+2"]),
        (["-0"], ["-0"]),
        (["99999999999999999999"], ["99999999999999999999"]),
        (["1", "B00X"], ["1", "B00X"]),
        (["1.0"], ["1.0"]),
    ],
)
def test_text_ids_are_integers_only_without_loss(texts, expected):
    assert ids.from_text(pa.array(texts)).to_pylist() == expected


def test_integers_of_several_widths_take_the_widest():
    def common(*types):
        return ids.common_type(types)

    assert common(pa.int32(), pa.int64()) == pa.int64()
    assert common(pa.uint8(), pa.uint16()) == pa.uint16()
    assert common(pa.int16(), pa.uint16()) == pa.int32()
    assert common(pa.int32(), pa.uint8()) == pa.int32()
    assert common(pa.uint64(), pa.int8()) == pa.int64()
    assert common(pa.string(), pa.large_string()) == pa.large_string()
    assert common(pa.int32(), pa.string()) == pa.large_string()
    with pytest.raises(InputError, match="user ids do not fit int64"):
        ids.cast(pa.array([2**64 - 1], pa.uint64()), pa.int64(), "user ids")


any_ids = st.one_of(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.lists(st.text(max_size=4), min_size=1))


@QUICK
@given(any_ids, st.data())
def test_codes_and_positions_of_present_and_absent_ids(values, draw):
    column = pa.chunked_array([pa.array(values)])
    unique, codes = ids.encode(column)
    assert unique.to_pylist() == sorted(set(values), key=lambda v: v.encode() if isinstance(v, str) else v)
    assert unique.take(pa.array(codes)).to_pylist() == values
    some = draw.draw(st.lists(st.sampled_from(values)))
    expected = [some.index(v) if v in some else -1 for v in values]
    unique_some = list(dict.fromkeys(some))
    found = ids.positions(column, pa.array(unique_some, column.type))
    assert found.tolist() == [unique_some.index(v) if v in unique_some else -1 for v in values]
    assert [e >= 0 for e in expected] == (found >= 0).tolist()


batches = st.lists(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=5), min_size=1, max_size=3), min_size=1)


@QUICK
@given(batches, st.integers(0, 30))
def test_codes_do_not_change_while_a_vocabulary_grows(batches, text_from):
    """Columns batch by batch: files of the narrowest integer type, or a text file whose ids become strings."""
    words, given, text = ids.Vocabulary("user ids"), [], False
    turns = text_from < sum(map(len, batches))
    for batch in batches:
        columns = []
        for values in batch:
            type = pa.int64() if turns else pa.uint8() if max(values) < 256 else pa.int16()
            text = text_from <= 0
            column = pa.array(values, type).cast(pa.string() if text else type)
            columns.append(("text file" if turns else f"file of {type}", pa.chunked_array([column])))
            text_from -= 1
            given += values
        codes = words.add(columns)
        assert codes.dtype == np.int32
        assert words.ids.take(pa.array(codes)).cast(pa.int64()).to_pylist() == [v for values in batch for v in values]
    found, places = words.finish()
    assert ids.is_text(found.type) == text
    assert found.to_pylist() == sorted({str(v) if text else v for v in given})
    assert sorted(places.tolist()) == list(range(len(found)))
    assert found.take(pa.array(places)).equals(words.ids.cast(found.type))


def test_one_file_with_text_makes_all_ids_text_as_they_are_written():
    words = ids.Vocabulary("user ids")
    codes = words.add(
        [("b", pa.chunked_array([pa.array([7, 12])])), ("a", pa.chunked_array([pa.array(["x", "007", "7"])]))]
    )
    assert codes[4] == codes[0]  # 7 is 7, written or counted
    assert len(set(codes.tolist())) == 4  # 007 is another item
    more = words.add([("b", pa.chunked_array([pa.array([12])]))])
    assert more.tolist() == [codes[1]]
    found, places = words.finish()
    assert found.to_pylist() == ["007", "12", "7", "x"]
    assert [found[places[code]].as_py() for code in codes] == ["7", "12", "x", "007", "7"]


def test_integers_become_text_where_another_source_has_text():
    words = ids.Vocabulary("item ids")
    codes = words.add([("b", pa.chunked_array([pa.array([7, 12])]))])
    found, places = words.finish(as_text=True)
    assert [found[places[code]].as_py() for code in codes] == ["7", "12"]


def test_integer_ids_of_different_types_match_by_value():
    among = pa.array([3, 2**64 - 1, 200], pa.uint64())
    assert ids.positions(pa.array([200, -1, 3, 4], pa.int64()), among).tolist() == [2, -1, 0, -1]
    assert ids.positions(pa.array([3, 300], pa.int64()), pa.array([3, 44], pa.int8())).tolist() == [0, -1]
    assert ids.positions(pa.array(["3"]), among).tolist() == [-1]
