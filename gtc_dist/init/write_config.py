"""Write a configuration for a folder of files:

    python -m gtc_dist.init shop --out shop.yaml

It looks at the names and columns of the files: interactions, vectors, and texts and pictures, for which it prints the
`gtc features` commands that turn them into vectors. What it guessed is in the comments; edit the file where it is
wrong.
"""

import argparse
import json
import posixpath
import re
import shlex
from pathlib import Path

import yaml

from gtc_dist.config_file import build_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.init.look_at_files import Found, look_at_folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gtc init", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder of the files, local or s3://")
    parser.add_argument("--out", required=True, help="YAML file to write")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out} exists; name another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"there is no folder {out.absolute().parent} for {out.name}; make it, or name another one")
    found = look_at_folder(args.folder)
    if not found.interactions and found.broken:
        raise InputError(found.broken[0])
    if not found.interactions:
        looked = [*found.vectors, *found.texts, *found.unknown]
        raise InputError(
            f"{args.folder} has no table with a column of users and one of items, such as user_id and item_id "
            f"(looked at {', '.join(looked[:5]) or 'pictures alone'}); rename the columns, or write the YAML by hand"
        )
    text = yaml_text(args.folder, found, out.stem)
    build_config(yaml.safe_load(text), str(out))
    out.write_text(text)
    print(next_steps(args.folder, found, args.out))


def yaml_text(folder: str, found: Found, name: str) -> str:
    """The configuration, with a comment on every guess."""
    (pattern, roles), *others = found.interactions.items()
    same = [pattern, *(other for other, columns in others if columns == roles)]
    given = split_files(same)
    lines = ["data:", f"  raw: {quoted(folder)}", f"  catalog: {quoted(f'work/{name}/catalog')}", "  interactions:"]
    if not given:
        lines.append(f"    files: [{', '.join(map(quoted, same))}]")
    lines += [f"    {role}: {quoted(column)}" for role, column in roles.items()]
    if "rating" in roles:
        lines.append("    # min_rating: 4   # drops lower ratings; now all count alike")
    lines += [f"    {line}" for line in found.hints.get(pattern, [])]
    lines += [f"    # not used: {quoted(other)} has other columns" for other, _ in others if other not in same]
    lines.append("  split:")
    if given:
        lines.append("    method: given   # by files")
        lines += [f"    {split}: [{quoted(file)}]" for split, file in given.items()]
    elif "time" in roles:
        lines.append("    method: global_time   # valid and test are later than train; or leave_last_out")
    else:
        lines.append("    method: ratio   # of each user's interactions, at random: no column has times")
    features, commands = feature_lines(found), feature_commands(folder, found)
    lines += ["  features:", *features] if features or commands else ["  features: {}   # needs one modality at least"]
    for command, entry in commands:
        lines += [f"    # made by: {command}", f"    {entry}"]
    lines += ["run:", f"  storage: {quoted(f'work/{name}/runs')}", "  name: first", ""]
    if found.unknown:
        lines.insert(0, f"# not understood: {', '.join(map(quoted, found.unknown[:10]))}")
    return "\n".join(lines)


def split_files(patterns: list[str]) -> dict[str, str]:
    """Split -> file, where the files are named after all three splits; else empty."""
    names = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
    stems = {posixpath.basename(pattern).partition(".")[0].lower(): pattern for pattern in patterns}
    found = {split: stems[stem] for split, options in names.items() for stem in options if stem in stems}
    return found if len(found) == len(names) == len(patterns) else {}


def feature_lines(found: Found) -> list[str]:
    """Entries of data.features for vectors that are there."""
    lines = []
    for pattern, (ids, column) in found.vectors.items():
        parts = [f"path: {quoted(pattern)}"]
        if column is None:
            parts += [f"ids: {quoted(ids)}"] if ids else []
        else:
            parts += [f"id_column: {quoted(ids)}"] if ids != "item_id" else []
            parts += [f"vector_column: {quoted(column)}"] if column != "vector" else []
        rows = "   # row number = item id" if column is None and not ids else ""
        lines.append(f"    {modality_name(pattern, lines)}: {{{', '.join(parts)}}}{rows}")
    return lines


def feature_commands(folder: str, found: Found) -> list[tuple[str, str]]:
    """Commands that make vectors of texts and pictures, each with its entry of data.features."""
    commands = []
    for pattern, (ids, columns) in found.texts.items():
        options = f"--id {shlex.quote(ids)} " if ids != "item_id" else ""
        name = f"text{len(commands) or ''}"
        texts = (
            f"--texts {shlex.quote(storage.join(folder, pattern))} {options}--columns {shlex.quote(','.join(columns))}"
        )
        commands.append((f"gtc features {texts} --out {shlex.quote(f'{folder}/features/{name}')}", entry_of(name)))
    for top, count in found.pictures.items():
        name = f"visual{sum('pictures' in command for command, _ in commands) or ''}"
        place = folder if top == "." else storage.join(folder, top)
        command = f"gtc features --pictures {shlex.quote(place)} --out {shlex.quote(f'{folder}/features/{name}')}"
        commands.append((f"{command}   # {count:,} pictures", entry_of(name)))
    return commands


def entry_of(name: str) -> str:
    return f"{name}: {{path: features/{name}/*.parquet}}"


def modality_name(pattern: str, taken: list[str]) -> str:
    """A name from the path: the file's without numbers and extension, or that of the folder of many files."""
    folder, _, base = pattern.rpartition("/")
    stem = folder.rpartition("/")[2] if "*" in base and folder else base.partition(".")[0]
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in stem).strip("*_-") or "content"
    same = sum(line.strip().startswith(name) for line in taken)
    return f"{name}{same + 1}" if same else name


def quoted(text: str) -> str:
    """A YAML string, quoted where it needs to be."""
    is_plain = re.fullmatch(r"[\w./-]+(:[\w./-]+)*", text) and yaml.safe_load(text) == text
    line_ends = r"[\x7f-\x9f\u2028\u2029\ufeff]"  # and others that YAML has not in a string, but JSON has
    return (
        text if is_plain else re.sub(line_ends, lambda c: f"\\u{ord(c[0]):04x}", json.dumps(text, ensure_ascii=False))
    )


def next_steps(folder: str, found: Found, out: str) -> str:
    """What was written and what to do now, for the terminal."""
    pattern, roles = next(iter(found.interactions.items()))
    columns = ", ".join(f"{role} {column}" for role, column in roles.items())
    more = f" and {len(found.interactions) - 1} more" if len(found.interactions) > 1 else ""
    lines = [f"{out}: interactions {pattern}{more} ({columns}); {len(found.vectors)} sets of vectors"]
    lines += [f"left out: {problem}" for problem in found.broken]
    commands = feature_commands(folder, found)
    if commands:
        lines += ["make vectors of the texts and pictures:"]
        lines += [f"  {command.partition('   #')[0]}" for command, _ in commands]
    if commands or found.vectors:
        lines += ["then:", *(f"  gtc {step} --config {shlex.quote(out)}" for step in ("prepare", "train"))]
    else:
        lines.append("there are no vectors, texts or pictures of the items: GTC needs one kind at least")
    return "\n".join(lines)
