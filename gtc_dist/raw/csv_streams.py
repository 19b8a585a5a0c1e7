"""Bytes of CSV and TSV files in a form that Arrow's parser reads."""

import codecs
import csv
import io

import pyarrow as pa
import pyarrow.csv

UNIT = b"\x1f"  # stands for a separator of several bytes


class OneByteSeparator:
    """A stream in which a separator of several bytes is replaced by one, since Arrow reads no other."""

    closed = False

    def __init__(self, stream: pa.NativeFile, separator: bytes):
        self.stream, self.separator, self.held = stream, separator, b""

    def read(self, size: int = -1) -> bytes:
        while True:
            more = self.stream.read(size)
            data, self.held = self.held + more, b""
            if not more:
                return data.replace(self.separator, UNIT)
            # the start of a separator at the end waits for its rest
            data = data.replace(self.separator, UNIT)
            lengths = range(len(self.separator) - 1, 0, -1)
            cut = next((n for n in lengths if data.endswith(self.separator[:n])), 0)
            data, self.held = data[: len(data) - cut], data[len(data) - cut :]
            if data:
                return data


class NotUtf8Error(ValueError):
    """`Utf8Stream` has met bytes that are not UTF-8."""


class Utf8Stream:
    """A stream that raises NotUtf8Error: Arrow cannot tell of a misfit, a row with another number of columns, whose
    text is not UTF-8."""

    closed = False

    def __init__(self, stream: pa.NativeFile):
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8")()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        try:
            self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise NotUtf8Error(str(error)) from None
        return data


class FittingRows:
    """A stream without misfits, which it finds itself, slower than Arrow.

    Args:
        columns: number of columns; 0: that of the first row.
        misfits: takes the misfits, as Arrow describes them.
    """

    closed = False

    def __init__(self, stream: pa.NativeFile, delimiter: str, columns: int, misfits: list):
        self.columns, self.misfits, self.number, self.consumed = columns, misfits, 0, []
        self.lines = io.TextIOWrapper(io.BufferedReader(RawStream(stream)), encoding="latin-1", newline="")
        quoting = csv.QUOTE_NONE if delimiter == UNIT.decode() else csv.QUOTE_MINIMAL
        self.rows = csv.reader(self._remembered_lines(), delimiter=delimiter, quoting=quoting)

    def read(self, size: int = -1) -> bytes:
        found, length = [], 0
        while length < max(size, 1):
            row = next(self.rows, None)
            text = "".join(self.consumed)
            self.consumed.clear()
            if row is None:
                break
            if row and text.strip("\r\n"):
                self.number += 1
                self.columns = self.columns or len(row)
                if len(row) != self.columns:
                    self.misfits.append(pa.csv.InvalidRow(self.columns, len(row), self.number, ""))
                    continue
            found.append(text)
            length += len(text)
        return "".join(found).encode("latin-1")

    def _remembered_lines(self):
        for line in self.lines:
            self.consumed.append(line)
            yield line


class RawStream(io.RawIOBase):
    """An Arrow stream as a raw stream of Python."""

    def __init__(self, stream: pa.NativeFile):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
