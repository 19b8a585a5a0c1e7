"""Options of `gtc features` in a YAML file."""

import pytest
from encoded_items import encode, picture_bytes, vectors, write_titles

from gtc_dist.errors import InputError
from gtc_dist.features.command_line import read_command_lines


def options(path, text: str, *words: str) -> list:
    path.write_text(text)
    return read_command_lines(["--config", str(path), *words], "")


def test_sets_of_a_file_are_encoded_in_turn(tmp_path, ray_local, small_parts, capsys):
    items, pictures = write_titles(tmp_path), tmp_path / "pictures"
    pictures.mkdir()
    for n in range(8):
        (pictures / f"{n}.jpg").write_bytes(picture_bytes(n % 4, n))
    text = f"- {{texts: {items}, columns: [title], width: 7, out: {tmp_path}/text}}\n"
    text += f"- {{pictures: {pictures}, out: {tmp_path}/visual, gpu: false}}\n"
    (tmp_path / "f.yaml").write_text(text)
    encode("--config", tmp_path / "f.yaml")
    assert {len(vector) for vector in vectors(tmp_path / "text").values()} == {7}
    assert sorted(vectors(tmp_path / "visual")) == list(range(8))
    encode("--config", tmp_path / "f.yaml")
    assert capsys.readouterr().out.count("is up to date") == 2


def test_options_of_the_command_line_override_those_of_the_file(tmp_path):
    text = "texts: -a.csv\ncolumns: [title, 7]\nout: o\nid: 007\nforce: true\n"
    (args,) = options(tmp_path / "f.yaml", text, "--width", "3", "--out=p")
    assert (args.texts, args.columns, args.out, args.width, args.force) == ("-a.csv", "title,7", "p", 3, True)
    (args,) = read_command_lines(["--texts", "a", "--columns", "b", "--out", "c"], "")
    assert (args.texts, args.width, args.force) == ("a", 256, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text: a\ncolumns: b\nout: c\n", "unknown key 'text'; did you mean 'texts'"),
        ("7: a\n", "unknown key 7; known keys: texts, pictures, out, id, columns, "),
        ("texts: a\nout: [b]\n", r"key 'out': expected text or a number, found \['b'\]"),
        ("texts: a\ngpu: 1\n", "key 'gpu': expected true or false, found 1"),
        ("texts: a\ntexts: b\n", "f.yaml:2: key 'texts' is given twice"),
        ("", "f.yaml holds no options; expected texts, "),
        ("[]", "f.yaml holds no options; expected texts, "),
        ("- {texts: a, columns: b, out: c}\n- d\n", "f.yaml holds no options; expected texts, "),
        ("- {texts: a, columns: b, out: c}\n- {pictures: a, out: ./c}\n", "two sets with the output folder .*/c; "),
        ("texts: [", "f.yaml is not valid YAML"),
    ],
)
def test_files_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        options(tmp_path / "f.yaml", text)
    with pytest.raises(InputError, match=r"config file nothing\.yaml does not exist"):
        read_command_lines(["--config", "nothing.yaml"], "")


def test_options_that_do_not_fit_each_other(tmp_path, capsys):
    for text, message in {
        "texts: a\nout: c\n": "--texts needs --columns",
        "texts: a\npictures: b\nout: c\n": "--pictures: not allowed with argument --texts",
        "texts: a\ncolumns: b\n": "the following arguments are required: --out",
        "texts: a\ncolumns: b\nout: c\nwidth: wide\n": "argument --width: invalid int value: 'wide'",
    }.items():
        with pytest.raises(SystemExit):
            options(tmp_path / "f.yaml", text)
        assert message in capsys.readouterr().err
