"""Files with random bytes and ids of any kind are read without change, or refused."""

import gzip
from pathlib import Path

import pyarrow as pa
from broken import CSV, GOOD, JSON
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.errors import InputError
from gtc_dist.raw import ids, parse

QUICK = settings(deadline=None, max_examples=25)
ROLES = {"user": "user_id", "item": "item_id"}


def rows_of(path: Path) -> list[dict] | None:
    """The rows of one file without Ray, or None if it is refused with its name in the message."""
    found = None
    try:
        found = [
            row for table in parse.read_table_file(parse.inspect_table(str(path), ROLES)) for row in table.to_pylist()
        ]
    except InputError as error:
        message = str(error)
    assert found is not None or str(path) in message
    return found


@QUICK
@given(st.sampled_from(["a.parquet", "a.csv", "a.jsonl", "a.csv.gz"]), st.data())
def test_a_file_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, name, draw):
    data = bytearray({"a.parquet": GOOD, "a.csv": CSV, "a.jsonl": JSON * 9, "a.csv.gz": gzip.compress(CSV)}[name])
    for place in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[place] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data[: draw.draw(st.integers(0, len(data)))] if draw.draw(st.booleans()) else data)
    rows_of(path)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=5)


@QUICK
@given(st.lists(st.tuples(words, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=8))
def test_any_ids_are_read_unchanged_from_csv(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    lines = ['"' + user.replace('"', '""') + f'",{item}\n' for user, item in pairs]
    path.write_text("user_id,item_id\n" + "".join(lines), encoding="utf-8", newline="")
    rows = rows_of(path)
    assert [(str(row["user"]), row["item"]) for row in rows] == pairs


@QUICK
@given(st.lists(st.one_of(st.none(), st.text(max_size=3), st.just(b"\xe9"), st.just("a\0")), max_size=8))
def test_the_first_bad_id_is_found(values):
    """Against a loop."""

    def problem(value) -> str:
        return (
            "null or empty" if value in (None, "") else "UTF-8" if value == b"\xe9" else "NUL" if "\0" in value else ""
        )

    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    bad, problem_text = ids.first_bad(pa.array(encoded, pa.binary()).view(pa.string()))
    wrong = {
        kind: [n for n, value in enumerate(values) if problem(value) == kind]
        for kind in ("UTF-8", "null or empty", "NUL")
    }
    expected = next(((kind, rows[0]) for kind, rows in wrong.items() if rows), None)
    assert bad == (None if expected is None else expected[1])
    assert (expected or ("",))[0] in problem_text
