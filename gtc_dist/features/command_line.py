"""Options of `gtc features`, from the command line or from a YAML file: a mapping for each set of vectors."""

import argparse

from gtc_dist.config_file import parse_yaml
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError, hint_at_known


def read_command_lines(argv: list[str] | None, description: str) -> list[argparse.Namespace]:
    """The options of each set of vectors; those of the command line override those of the file.

    Raises:
        InputError: a broken file, an unknown key, or one output folder for two sets.
        SystemExit: options that do not fit each other.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    given, rest = first.parse_known_args(argv)
    parser = _parser(description)
    if given.config is None:
        return [_checked(parser, rest)]
    sets = [_checked(parser, words + rest) for words in _words_of_sets(given.config, parser)]
    outs = [storage.absolute(args.out) for args in sets]
    for out in outs:
        if outs.count(out) > 1:
            raise InputError(f"{given.config} has two sets with the output folder {out}; name one for each")
    return sets


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gtc features",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with these options, or a list of such sets")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", metavar="FILES", help="tables with texts")
    source.add_argument("--pictures", metavar="FOLDER|FILES", help="folder of pictures, or tables that name them")
    parser.add_argument("--out", required=True, help="folder for the vectors, new or of an interrupted command")
    parser.add_argument("--id", default="item_id", help="column with the item's id (default: %(default)s)")
    parser.add_argument("--columns", help="columns with the texts, comma-separated, or the one that names the picture")
    parser.add_argument("--encoder", help="ngrams (texts), descriptor (pictures), FAMILY:MODEL or module:callable")
    parser.add_argument("--width", type=int, default=256, help="dimensions of ngrams (default: %(default)s)")
    parser.add_argument("--like", metavar="FOLDER", help="use the fitted encoder of this output")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each task")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    return parser


def _checked(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    args = parser.parse_args(words)
    if args.texts and not args.columns:
        parser.error("--texts needs --columns, the columns with the texts")
    if args.width < 1:
        parser.error("--width must be positive")
    return args


def _words_of_sets(uri: str, parser: argparse.ArgumentParser) -> list[list[str]]:
    """The options of each set in a YAML file, as words of a command line."""
    if not storage.exists(uri):
        raise InputError(f"config file {uri} does not exist")
    with formats.parsing(uri, "UTF-8 text"):
        text = storage.read_bytes(uri).decode("utf-8-sig")
    found = parse_yaml(text, uri)
    sets = found if isinstance(found, list) else [found]
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if not sets or not all(isinstance(each, dict) and each for each in sets):
        raise InputError(f"{uri} holds no options; expected {', '.join(known)}, or a list of such mappings")
    return [[word for key, value in each.items() for word in _words(uri, known, key, value)] for each in sets]


def _words(uri: str, known: dict[str, argparse.Action], key: str, value) -> list[str]:
    if key not in known:
        raise InputError(f"{uri}: unknown key {key!r}; {hint_at_known(key, known)}")
    if known[key].nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{uri}: key {key!r}: expected true or false, found {value!r}")
        return [f"--{key}"] if value else []
    if key == "columns" and isinstance(value, list):
        value = ",".join(map(str, value))
    if value is None or isinstance(value, bool | list | dict):
        raise InputError(f"{uri}: key {key!r}: expected text or a number, found {value!r}")
    return [f"--{key}={value}"]
