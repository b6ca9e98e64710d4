"""A user's own `package.module:factory`: found without importing it, imported, called. Imports no torch."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from maseRT.errors import UsageError, did_you_mean


def factory_source(name: str) -> Path | None:
    """Return the file of a `package.module:factory`, without importing any of it.

    The working directory is searched first, then sys.path. None when the name has another form, or when no
    Python source file is found.
    """
    module, colon, factory = name.partition(":")
    if not (colon and factory and all(part.isidentifier() for part in module.split("."))):
        return None
    spec = _spec_of(module)
    if spec is None or not spec.has_location or not spec.origin:
        return None
    source = Path(spec.origin)
    return source if source.suffix == ".py" else None


def _spec_of(module: str) -> ModuleSpec | None:
    """Walk down the packages by their folders; importlib.util.find_spec would import the parents."""
    folders: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for part in module.split("."):
        if folders is None:
            return None
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        found = spec.submodule_search_locations
        folders = None if found is None else list(found)
    return spec


@contextmanager
def working_directory_first() -> Iterator[None]:
    """Put the working directory in front of sys.path, as `python script.py` does with the script's."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def import_factory(name: str, *, where: str) -> Callable[..., Any]:
    """Import `package.module:factory`, from the working directory too, and return the callable.

    Args:
        name: "package.module:factory".
        where: the config key that holds the name, for messages.

    Raises:
        UsageError: the name is not of that form; the module is not found, raises while it is imported, or was
            imported from elsewhere before; it has no such attribute; the attribute is not callable.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(
            f"'{name}' is not package.module:factory", where=where, fix='for example "my_package.my_module:make_model"'
        )
    module = _import_module(module_name, where=where)
    _check_origin(name, module_name, getattr(module, "__file__", None), where=where)
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise UsageError(
            f"module '{module_name}' has no '{attribute}'{did_you_mean(attribute, public)}",
            where=where,
            fix=f"define it in {getattr(module, '__file__', module_name)}, or correct the name after the colon",
        )
    factory = getattr(module, attribute)
    if not callable(factory):
        raise UsageError(
            f"'{name}' is not callable: it is a {type(factory).__name__}",
            where=where,
            fix=f"make it a function: def {attribute}(): return ...",
        )
    return factory  # type: ignore[no-any-return]


def call_factory(factory: Callable[..., Any], arguments: Mapping[str, Any], *, name: str, where: str) -> Any:
    """Call a user's factory; whatever it raises becomes a UsageError that holds its text and line.

    Raises:
        UsageError: the factory raised.
    """
    try:
        with working_directory_first():
            return factory(**arguments)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the factory '{name}' raised {described(error)}", where=where, fix="correct the factory, or its args"
        ) from error


def described(error: BaseException) -> str:
    """Return `ValueError: text (model.py, line 12)`; the line is the innermost one of the user's own code."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_a_users(frame.filename)]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text


def _is_a_users(filename: str) -> bool:
    return not (filename.startswith("<") or filename in (__file__, importlib.__file__) or "site-packages" in filename)


def _import_module(module_name: str, *, where: str) -> Any:
    try:
        with working_directory_first():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UsageError(
                f"no module '{missing}'",
                where=where,
                fix=f"install it, or run in the folder that holds it (searched first: {Path.cwd()})",
            ) from error
        raise UsageError(
            f"importing '{module_name}' raised {described(error)}", where=where, fix=f"install '{missing}'"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"importing '{module_name}' raised {described(error)}", where=where, fix="correct the module"
        ) from error


def _check_origin(name: str, module_name: str, loaded_from: str | None, *, where: str) -> None:
    """Refuse a module that an earlier import shadows: a user's code.py would silently be the standard library's."""
    source = factory_source(name)
    if source is not None and loaded_from is not None and source.resolve() != Path(loaded_from).resolve():
        raise UsageError(
            f"'{module_name}' is {source}, but {loaded_from} was imported under that name before",
            where=where,
            fix="rename the file or its package",
        )
