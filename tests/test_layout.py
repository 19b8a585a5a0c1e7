"""Layout of the package: import order of the folders, where Ray and DGL are imported, sizes, and unique names."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from small import ROOT

PACKAGE = ROOT / "gtc_dist"
# A file may import its own folder, folders named on the same line, and folders above that line.
ORDER = [
    ["errors", "progress"],
    ["config_data", "config", "config_reference", "config_upgrade", "config_file"],
    ["distributed"],
    ["data"],
    ["graph", "checkpoint", "raw"],
    ["model", "evaluation", "hybrid", "embedding_formats"],
    ["subgraph", "warm_start"],
    ["inference", "tracking"],
    ["training"],
    ["final_fit", "preflight"],
    ["launch"],
    ["prepare", "synthetic", "train", "evaluate", "export"],
    ["features", "tune"],
    ["recommend", "refresh", "init"],
    ["report"],
    ["import_layout"],
    ["__main__", "api"],
]
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILES, MAX_LINES, MAX_CHAIN, MAX_SHARE = 12, 350, 5, 0.2


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules that a file imports anywhere, also in functions: `gtc_dist.data.storage`, `ray`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def folder_of(module: str) -> str | None:
    """Folder, or file at the top, of a module of the package; None for other modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gtc_dist" and len(parts) > 1 else None


def folder_of_file(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    level = {name: n for n, line in enumerate(ORDER) for name in line}
    if path == PACKAGE / "__init__.py":
        return
    for module in imports(path):
        if (other := folder_of(module)) is not None and other != folder_of_file(path):
            assert level[other] <= level[folder_of_file(path)], f"{path} imports {module}"
    if folder_of_file(path) in ("distributed", "model"):
        assert not {module.split(".")[0] for module in imports(path)} & {"ray", "dgl"}


def test_ray_and_dgl_are_imported_in_their_places():
    users = defaultdict(set)
    for path in FILES:
        for module in imports(path):
            users[module.split(".")[0]].add(str(path.relative_to(PACKAGE)))
    assert users["dgl"] == {"graph/neighbor_sampler.py"}
    places = ("launch/", "preflight/", "tune/")
    assert all(name.startswith(places) or name == "data/ray_tasks.py" for name in users["ray"])


def test_folders_and_files_stay_small():
    lines = {path: path.read_text().count("\n") for path in FILES}
    total = sum(lines.values())
    for path, count in lines.items():
        assert count <= MAX_LINES, path
    for folder in {path.parent for path in FILES}:
        inside = [path for path in FILES if path.parent == folder]
        assert len(inside) <= MAX_FILES, folder
        if folder != PACKAGE:
            assert sum(lines[path] for path in inside) <= MAX_SHARE * total, folder
            assert max(chain(path) for path in inside) <= MAX_CHAIN, folder


@cache
def chain(path: Path) -> int:
    """Files in the longest chain of imports that starts at a file and stays in its folder."""
    others = [other for other in path.parent.glob("*.py") if other != path]
    used = [
        other
        for other in others
        if ".".join(["gtc_dist", *other.relative_to(PACKAGE).with_suffix("").parts]) in imports(path)
    ]
    return 1 + max((chain(other) for other in used), default=0)


def test_public_names_are_unique():
    """No two public classes, functions or constants of the package share a name; every command has its main."""
    places = defaultdict(set)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                places[node.name].add(path)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    places.update({n.id: places[n.id] | {path} for n in ast.walk(target) if isinstance(n, ast.Name)})
    shared = {name: files for name, files in places.items() if len(files) > 1 and not name.startswith("_")}
    assert set(shared) <= {"main"}, shared
