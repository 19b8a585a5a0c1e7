"""Output folders of commands: a marker file is written first, a manifest last.

A folder is `empty`, `incomplete` (a command is writing it, or was interrupted) or `complete` (the manifest exists). A
crash at any point leaves one of these states. A folder with other files is refused: a command deletes only files that
it writes itself.

Order of use: `state` and `check_writable` before the work starts, `clear` and `mark` before the first file, `finish`.
`start_empty` does the first three for commands that keep nothing of an earlier result; with `goes_on` a command keeps
the files that it had finished when it was interrupted.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from gtc_dist.data import storage
from gtc_dist.errors import InputError


class StateFiles(NamedTuple):
    """Files that say how far a command came with a folder."""

    marker: str  # until the folder is complete
    manifest: str  # from then on
    command: str  # for messages


# What `prepare` reads; readers of Parquet folders leave out names that begin with _.
FEATURES_FILES = StateFiles("_encoding.json", "_manifest.json", "gtc features")
IMPORT_FILES = StateFiles("_importing.json", "_import.json", "gtc import")
DATASET_FILES = StateFiles("dataset.building.json", "dataset.json", "tools/make_dataset.py")


def refuse_unfinished(folders: Iterable[str]) -> None:
    """Raises InputError for a folder whose command still runs or was interrupted; others are not looked into."""
    for folder in sorted(set(folders)):
        for files in (FEATURES_FILES, IMPORT_FILES, DATASET_FILES):
            marker, manifest = (storage.join(folder, name) for name in (files.marker, files.manifest))
            if storage.exists(marker) and not storage.exists(manifest):
                raise InputError(
                    f"{folder} is not complete: {files.command} is writing it, or was interrupted; run that command "
                    "again, to its end"
                )


@dataclass(frozen=True)
class OutputFolder:
    """A folder that one kind of command fills.

    Args:
        uri: the folder, local or in object storage.
        title: name of the folder in errors, such as `data.catalog`.
        kind: what the folder holds, with an article, such as `a catalog`.
        own_files: regular expression of the names that the command writes beside manifest and marker, relative to the
            folder.
        manifest: file that makes the folder complete.
        marker: file that identifies an incomplete folder. None: `own_files` is so specific that it identifies one.
        marker_content: written into the marker, as JSON.
    """

    uri: str
    title: str
    kind: str
    own_files: str
    manifest: str
    marker: str | None
    marker_content: dict = field(default_factory=dict)

    def state(self) -> Literal["empty", "incomplete", "complete"]:
        """Raises InputError if the folder has files that the command does not write, or files without a marker."""
        names = [name for name in storage.listing(self.uri) if not name.startswith(storage.PROBE)]
        fixed = "|".join(re.escape(name) for name in (self.manifest, self.marker) if name)
        own = re.compile(rf"({self.own_files}|{fixed})(\.[^/]*partial)?", re.DOTALL)
        foreign = sorted(name for name in names if not own.fullmatch(name))
        if names and self.marker is not None and not {self.manifest, self.marker} & set(names):
            foreign = sorted(names)
        if foreign:
            raise InputError(
                f"{self.title} {self.uri} is not empty: {len(foreign)} of {len(names)} files are not part of "
                f"{self.kind}, such as {foreign[0]}; name another folder"
            )
        return "complete" if self.manifest in names else "incomplete" if names else "empty"

    def check_writable(self) -> None:
        """Write and remove an empty file. Raises InputError if that fails, or if a file has the folder's name."""
        if storage.is_local(self.uri):
            path = Path(storage.absolute(self.uri))
            nearest = next(above for above in (path, *path.parents) if above.exists())
            if not nearest.is_dir():
                raise InputError(f"{self.title} {self.uri}: {nearest} is a file, not a folder; name another folder")
        storage.check_writable(self.uri)

    def start_empty(self, named: str) -> None:
        """Make the folder empty: files of a command that was interrupted are removed.

        Args:
            named: the folder as the user gave it, for messages.

        Raises:
            InputError: the folder has a complete result or other files, or cannot be written to.
        """
        state = self.state()
        if state == "complete":
            raise InputError(
                f"{self.title} {named} is not empty, it holds {self.kind}; name another folder, or remove it"
            )
        self.check_writable()
        if state == "incomplete":
            print(f"{named}: the command that wrote {self.kind} here was cut off: starting again", flush=True)
            self.clear()

    def goes_on(self) -> bool:
        """Whether an incomplete folder is of an interrupted command with the same `marker_content`. If so, files that
        it left half-written are removed; finished ones stay.

        Raises:
            InputError: the folder cannot be written to.
        """
        if storage.read_json(storage.join(self.uri, self.marker)) != self.marker_content:
            return False
        self.check_writable()
        for name in storage.listing(self.uri):
            if name.endswith(".partial"):
                storage.remove_tree(storage.join(self.uri, name))
        return True

    def mark(self) -> None:
        """Write the marker."""
        if self.marker is not None:
            storage.write_json(storage.join(self.uri, self.marker), self.marker_content)

    def clear(self) -> None:
        """Empty the folder, after `state` accepted it: write the marker, remove the manifest, then the other files."""
        names = sorted(storage.listing(self.uri), key=lambda name: name != self.manifest)
        if names and self.marker is not None:
            storage.write_json(storage.join(self.uri, self.marker), {})  # until `mark`: old files may still be there
        for name in names:
            if name != self.marker:
                storage.remove_tree(storage.join(self.uri, name))

    def finish(self, manifest: dict) -> None:
        """Write the manifest, then remove the marker."""
        storage.write_json(storage.join(self.uri, self.manifest), manifest)
        if self.marker is not None:
            storage.remove_tree(storage.join(self.uri, self.marker))
