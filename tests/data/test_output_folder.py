"""Output folders: states, refusals, and the order in which files are written and removed."""

import os
import sys

import pytest

from gtc_dist.data import storage
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.errors import InputError


def folder(uri, marker: str | None = "marker.json") -> OutputFolder:
    return OutputFolder(
        str(uri), "the folder", "a result", r"parts/part-\d\.bin", "manifest.json", marker, {"version": 3}
    )


def write(path, *names: str) -> None:
    for name in names:
        storage.write_bytes(f"{path}/{name}", b"x")


def watch_changes(path, action) -> list[tuple[str, str]]:
    """(operation, relative name) of each file that an action renames into place or removes."""
    seen: list[tuple[str, str]] = []
    watching = [True]  # an audit hook cannot be removed

    def watch(event: str, args: tuple) -> None:
        if watching and event in ("os.remove", "os.rename"):
            changed = str(args[0] if event == "os.remove" else args[1])
            seen.append((event, os.path.relpath(changed, path)))

    sys.addaudithook(watch)
    action()
    watching.clear()
    return seen


@pytest.mark.parametrize("marker", ["marker.json", None])
def test_states_from_empty_to_complete(tmp_path, marker):
    output = folder(tmp_path / "out", marker)
    assert output.state() == "empty"
    output.check_writable()
    assert not (tmp_path / "out").exists()
    output.clear()
    output.mark()
    write(output.uri, "parts/part-0.bin")
    assert output.state() == "incomplete"
    output.finish({"rows": 1})
    assert output.state() == "complete"
    assert storage.read_json(f"{output.uri}/manifest.json") == {"rows": 1}
    assert sorted(storage.listing(output.uri)) == ["manifest.json", "parts/part-0.bin"]


def test_a_command_that_was_killed_while_writing_leaves_an_incomplete_folder(tmp_path):
    write(tmp_path, "marker.json", "parts/part-0.bin", "parts/part-1.bin.1a2b3c4d.partial", storage.PROBE)
    output = folder(tmp_path)
    assert output.state() == "incomplete"
    write(tmp_path, "manifest.json")  # written, but the marker was not removed
    assert output.state() == "complete"


@pytest.mark.parametrize("names", [["notes.txt"], ["parts/part-0.bin"], ["marker.json", "parts/other"]])
def test_files_that_the_command_does_not_write_are_refused(tmp_path, names):
    write(tmp_path, *names)
    with pytest.raises(InputError, match=rf"the folder .*is not empty: 1 of .* such as {names[-1]}; name another"):
        folder(tmp_path).state()


def test_without_a_marker_own_files_identify_an_incomplete_folder(tmp_path):
    write(tmp_path, "parts/part-0.bin")
    assert folder(tmp_path, marker=None).state() == "incomplete"


def test_clearing_writes_the_marker_then_removes_the_manifest_then_the_rest(tmp_path):
    """So that an interruption at any point leaves an incomplete folder, neither foreign nor complete."""
    write(tmp_path, "parts/part-0.bin", "manifest.json", "parts/part-1.bin")
    output = folder(tmp_path)
    seen = watch_changes(tmp_path, output.clear)
    assert seen[:2] == [("os.rename", "marker.json"), ("os.remove", "manifest.json")]
    assert sorted(seen[2:]) == [("os.remove", "parts/part-0.bin"), ("os.remove", "parts/part-1.bin")]
    assert list(storage.listing(output.uri)) == ["marker.json"]
    assert storage.read_json(f"{tmp_path}/marker.json") == {}  # old files may be there until it is done
    output.mark()
    assert storage.read_json(f"{tmp_path}/marker.json") == {"version": 3}


def test_finishing_writes_the_manifest_then_removes_the_marker(tmp_path):
    output = folder(tmp_path)
    output.mark()
    seen = watch_changes(tmp_path, lambda: output.finish({}))
    assert seen == [("os.rename", "manifest.json"), ("os.remove", "marker.json")]


def test_a_new_result_starts_in_an_empty_folder(tmp_path, capsys):
    output = folder(tmp_path / "out")
    output.start_empty("out")
    assert capsys.readouterr().out == ""
    output.mark()
    write(output.uri, "parts/part-0.bin")
    output.start_empty("out")
    assert list(storage.listing(output.uri)) == ["marker.json"]
    assert "out: the command that wrote a result here was cut off" in capsys.readouterr().out
    output.finish({})
    with pytest.raises(InputError, match="the folder out is not empty, it holds a result; name another folder"):
        output.start_empty("out")
    assert list(storage.listing(output.uri)) == ["manifest.json"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    write(tmp_path, "file")
    with pytest.raises(InputError, match=r"the folder .*: .*/file is a file, not a folder"):
        folder(tmp_path / "file/out").check_writable()


def test_an_output_folder_in_object_storage(s3):
    output = folder(f"{s3}/out")
    assert output.state() == "empty"
    output.check_writable()
    output.mark()
    write(output.uri, "parts/part-0.bin")
    assert output.state() == "incomplete"
    output.finish({})
    assert output.state() == "complete"
    output.clear()
    assert list(storage.listing(output.uri)) == ["marker.json"]


def test_a_command_goes_on_with_what_it_had_finished(tmp_path):
    output = folder(tmp_path / "out")
    output.mark()
    write(output.uri, "parts/part-0.bin", "parts/part-1.bin.1a2b3c4d.partial")
    assert output.goes_on()
    assert sorted(storage.listing(output.uri)) == ["marker.json", "parts/part-0.bin"]
    storage.write_json(f"{output.uri}/marker.json", {"version": 4})
    assert not output.goes_on()
    assert sorted(storage.listing(output.uri)) == ["marker.json", "parts/part-0.bin"]
