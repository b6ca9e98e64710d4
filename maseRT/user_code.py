"""The files of a user's own code, found by its import statements; nothing is imported. Torch-free, for step keys."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from maseRT.factories import module_source

_PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})
_LIBRARIES = (Path(sysconfig.get_path("stdlib")), Path(__file__).parent)


def code_files(module: str) -> list[Path]:
    """Return the file of `package.module`, those of the modules that it imports, those that they import, and so on.

    The standard library, installed packages and maseRT end the search: only what a user edits counts. A module whose
    name is made at run time is not seen.
    """
    found: dict[Path, None] = {}
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        path = module_source(name)
        if path is None or (name != module and _is_installed(path)):
            continue
        found[path] = None
        if not _is_installed(path):
            pending += [*_parents(name), *_imported(path, name)]
    return list(found)


def _is_installed(path: Path) -> bool:
    return not _PACKAGE_FOLDERS.isdisjoint(path.parts) or any(path.is_relative_to(folder) for folder in _LIBRARIES)


def _parents(name: str) -> list[str]:
    """Return the packages of a module, whose `__init__` Python runs first: a and a.b of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _imported(path: Path, name: str) -> Iterator[str]:
    """Yield every dotted name that a file may import as a module: of `from a import b` both a and a.b."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # importing it tells the user
        return
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for dotted in wanted:
            yield from (*_parents(dotted), dotted)
