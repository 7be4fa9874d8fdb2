"""Who may import whom: rooms look one way, and heavy libraries live where they are used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moeplan"
BASE = {"errors", "units", "records", "_version"}
# A room imports itself, what stands before it, and nothing of a room beside it.
MAY_IMPORT = {
    "profiles": BASE,
    "costmodels": BASE | {"profiles"},
    "planner": BASE | {"profiles", "costmodels"},
    "exporters": BASE | {"profiles", "costmodels", "planner"},
    "runtime": BASE | {"profiles", "costmodels", "planner"},
    "cli": BASE | {"profiles", "costmodels", "planner", "exporters", "runtime"},
    "__init__": BASE | {"profiles", "costmodels", "planner"},
    "__main__": {"cli"},
    "errors": set(),
    "units": {"errors"},
    "records": {"errors"},
    "_version": set(),
}
# Libraries with one home each; numpy and yaml may be anywhere below the command line's entrance.
HOMES = {"click": "cli/", "rich": "cli/", "torch": "profiles/ runtime/"}
HOMES |= {"pulp": "planner/partition.py planner/elastic/choice_milp.py"}
HOMES |= {"distributed": "planner/sweeps/dask_engine.py", "pyarrow": "cli/sweep_files.py"}  # extras, loaded when asked for
ALLOWED = {"numpy", "yaml", *HOMES}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            yield node.module
            if node.module == "moeplan":
                yield from (f"moeplan.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "moeplan" and len(parts) > 1 and parts[1] != room:
            assert parts[1] in MAY_IMPORT[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_at_home(path: Path) -> None:
    import sys

    inside = str(path.relative_to(PACKAGE))
    for name in imports(path):
        library = name.split(".")[0]
        if library in sys.stdlib_module_names or library == "moeplan":
            continue
        assert library in ALLOWED, f"{inside} imports {library}, which is no core dependency"
        if library in HOMES:
            assert any(inside.startswith(home) for home in HOMES[library].split()), f"{inside} imports {library}"


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


def test_the_command_line_loads_its_libraries_late() -> None:
    """Files of the cli import numpy and the other rooms only inside functions, where the module is read for its help."""
    body = ast.parse((PACKAGE / "cli" / "__init__.py").read_text(encoding="utf-8")).body
    top = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names} | {
        str(n.module) for n in top if isinstance(n, ast.ImportFrom)
    }
    assert {n.split(".")[0] for n in names} <= {
        "__future__",
        "contextlib",
        "importlib",
        "os",
        "sys",
        "typing",
        "click",
        "moeplan",
    }
    assert {n for n in names if n.startswith("moeplan")} == {"moeplan._version", "moeplan.errors"}
