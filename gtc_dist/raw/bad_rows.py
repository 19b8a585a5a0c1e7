"""Rows of raw interactions that cannot be used: where they are, what is wrong, and the message or table of them.

Text files are numbered by lines, as an editor does, Parquet by rows from 1.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from gtc_dist.errors import InputError
from gtc_dist.raw.csv_streams import RawStream
from gtc_dist.raw.interaction_file import InteractionFile, open_stream

SHOWN_ROWS = 5  # bad rows in a message
SHOWN_TEXT = 80  # characters of a row there
KEPT = 10_000  # bad rows of a file of which more than the number is known
SKIP = ", or leave them out with data.interactions.on_bad_rows=skip"
REJECTED = pa.schema([("place", pa.string()), ("row", pa.string()), ("problem", pa.string()), ("count", pa.int64())])


@dataclass
class BadRows:
    """Bad rows of one file.

    rows: number of a row -> what is wrong. Numbers are from 1 and, for CSV and TSV, count all rows of the file, the
    header's and those with another number of columns, too. count: number of bad rows.
    """

    file: InteractionFile
    rows: dict[int, str] = field(default_factory=dict)
    count: int = 0

    def add(self, number: int, problem: str) -> None:
        self.count += 1
        if len(self.rows) < KEPT:
            self.rows[number] = problem

    @property
    def are_enough(self) -> bool:
        """Whether a file that is refused need not be read further."""
        return self.count >= KEPT

    def refuse(self, remedy: str = SKIP) -> None:
        """Raises InputError, which shows the first of the rows, if there are any."""
        if not self.count:
            return
        first = dict(sorted(self.rows.items())[:SHOWN_ROWS])
        shown = "; ".join(f"{place}: {first[number]}{_quoted(row)}" for number, place, row in located(self.file, first))
        more = f" and {self.count - len(first):,} more" if self.count > len(first) else ""
        number = f"{self.count:,}{' or more' if self.are_enough else ''} bad rows: " if self.count > 1 else ""
        raise InputError(f"{self.file.uri}: {number}{shown}{more}. Correct them{remedy}")

    def table(self) -> pa.Table:
        """The rows as a table (`REJECTED`), whose first row has the number of all bad rows."""
        found = list(located(self.file, self.rows))
        columns = [[p for _, p, _ in found], [r for _, _, r in found], [self.rows[n] for n, _, _ in found]]
        counts = [self.count] + [0] * (len(found) - 1) if found else []
        return pa.table([*columns, counts], schema=REJECTED)


def located(file: InteractionFile, numbers: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Number, place and text of rows, in order: "line 7" of text files, "row 7" without a text of Parquet."""
    wanted = set(numbers)
    if not file.is_text:
        yield from ((number, f"row {number}", "") for number in sorted(wanted))
        return
    for number, (line, text) in enumerate(_csv_rows(file) if file.is_csv else _json_rows(file), start=1):
        if number in wanted:
            yield number, f"line {line}", text
            wanted.remove(number)
            if not wanted:
                return
    yield from ((number, "a row at the end", "") for number in sorted(wanted))  # an open quote


def json_lines(file: InteractionFile) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank, and their numbers."""
    for line, text in enumerate(io.BufferedReader(RawStream(open_stream(file))), start=1):
        if text.strip():
            yield line, text


def _json_rows(file: InteractionFile) -> Iterator[tuple[int, str]]:
    for line, text in json_lines(file):
        yield line, text.decode(errors="replace").strip()


def _csv_rows(file: InteractionFile) -> Iterator[tuple[int, str]]:
    """First line and text of every row, the header's too; blank lines are no rows."""
    consumed: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.TextIOWrapper(io.BufferedReader(RawStream(open_stream(file))), errors="replace", newline=""):
            consumed.append(line)
            yield line

    single = len(file.delimiter) == 1
    quoting = csv.QUOTE_MINIMAL if single else csv.QUOTE_NONE
    line = 1
    for row in csv.reader(lines(), delimiter=file.delimiter if single else "\x1f", quoting=quoting):
        if row and any(text.strip("\r\n") for text in consumed):
            yield line, "".join(consumed).strip("\r\n")
        line += len(consumed)
        consumed.clear()


def first_line(file: InteractionFile) -> str:
    """The first line of CSV that is not blank."""
    return next(_csv_rows(file), (0, ""))[1]


def _quoted(row: str) -> str:
    row = row.replace("\0", "\\0")
    return f": {row if len(row) <= SHOWN_TEXT else row[:SHOWN_TEXT] + '...'!r}" if row else ""
