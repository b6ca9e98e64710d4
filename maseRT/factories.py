"""A user's own `package.module:factory`: found without importing it, imported, and called, each with its own errors.

Torch-free, because step keys need a module's file before anything heavy is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from maseRT.errors import MaseRTError, UsageError, did_you_mean

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_LISTED = 12
_FORM = re.compile(rf"({_DOTTED}):({_DOTTED})")


def is_factory(name: str) -> bool:
    """Tell whether a name has the form `package.module:factory`."""
    return _FORM.fullmatch(name) is not None


def module_source(name: str) -> Path | None:
    """Return the file of `package.module`, without importing it or its packages.

    The working directory is searched first, then what Python would search. None: the module is not there, or it
    has no file (a built-in or a namespace package).
    """
    spec = _find_module(name) if re.fullmatch(_DOTTED, name) else None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    return Path(spec.origin)


def load_factory(name: str, *, what: str) -> Callable[..., Any]:
    """Import `package.module:factory`, as `load_module` does.

    Args:
        name: the module and, after the colon, the callable in it (`Class.method` too).
        what: what the factory makes, for the errors: "model" or "data set".

    Raises:
        UsageError: another form, no such attribute, not callable, or what `load_module` raises.
    """
    where = _where(name, what)
    if not is_factory(name):
        fix = "for example my_package.my_module:make"
        raise UsageError(f"'{name}' is not package.module:factory", where=where, fix=fix)
    module_name, _, path = name.partition(":")
    module = load_module(module_name, where=where)
    factory: Any = module
    for attribute in path.split("."):
        if not hasattr(factory, attribute):
            public = (
                [word for word in vars(factory) if not word.startswith("_")] if hasattr(factory, "__dict__") else []
            )
            found_in = getattr(module, "__file__", None) or module_name
            hint = did_you_mean(attribute, public, listed=len(public) <= _LISTED)
            raise UsageError(f"{found_in} has no '{attribute}'{hint}", where=where)
        factory = getattr(factory, attribute)
    if not callable(factory):
        fix = f"name a function that returns the {what}"
        raise UsageError(f"'{path}' is not callable, it is of type {type(factory).__name__}", where=where, fix=fix)
    loaded: Callable[..., Any] = factory
    return loaded


def load_module(name: str, *, where: str) -> ModuleType:
    """Import `package.module`. The working directory comes first on `sys.path`, and stays there.

    It stays because the user's code may import its neighbours later, and loader processes import it again.

    Raises:
        UsageError: no such module, the import raised, or another module of that name was imported before.
    """
    directory = os.getcwd()
    sys.path[:] = [directory, *(entry for entry in sys.path if entry != directory)]
    source = module_source(name)
    try:
        module = importlib.import_module(name)
    except MaseRTError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _not_found(error.name, where=where) from error
        raise UsageError(f"importing '{name}' raised {_described(error, source)}", where=where) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing '{name}' raised {_described(error, source)}", where=where) from error
    _check_same_file(module, source, where=where)
    return module


def call_factory(name: str, /, *, what: str, **kwargs: Any) -> Any:
    """Import `package.module:factory`, call it with `kwargs` and return what it gives.

    Raises:
        UsageError: as `load_factory`; or the arguments do not fit the factory; or it raised, which names the line.
    """
    where = _where(name, what)
    factory = load_factory(name, what=what)
    _check_arguments(factory, kwargs, where=where)
    try:
        return factory(**kwargs)
    except MaseRTError:
        raise
    except (Exception, SystemExit) as error:
        file = inspect.getsourcefile(inspect.unwrap(factory)) if inspect.isroutine(factory) else None
        raise UsageError(f"the factory raised {_described(error, file)}", where=where) from error


def _where(name: str, what: str) -> str:
    return f"{what} '{name}'"


def _find_module(module: str) -> ModuleSpec | None:
    importlib.invalidate_caches()
    first, *rest = module.split(".")
    spec = _find_top_level(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # The bare name: with the dotted one, a namespace package looks for its parent in sys.modules.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def _find_top_level(name: str) -> ModuleSpec | None:
    for finder in sys.meta_path:
        path = [os.getcwd(), *sys.path] if finder is PathFinder else None
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None


def _not_found(name: str, *, where: str) -> UsageError:
    """Return the error for a module that is not there; modules of the working directory are suggested."""
    directory = Path.cwd()
    files = (path.stem for path in directory.glob("*.py"))
    packages = (path.parent.name for path in directory.glob("*/__init__.py"))
    hint = did_you_mean(name, [*files, *packages], listed=False)
    fix = f"run from the directory that holds {name.partition('.')[0]}, or install it"
    return UsageError(
        f"there is no module '{name}' in {directory} or among the installed packages{hint}", where=where, fix=fix
    )


def _check_same_file(module: ModuleType, source: Path | None, *, where: str) -> None:
    """Refuse a module that another one of the same name stands in for: the step key hashed the file on disk."""
    loaded = getattr(module, "__file__", None)
    if source is None or loaded is None or Path(loaded).resolve() == source.resolve():
        return
    fix = f"give {source.name} a name that no installed or imported module has"
    raise UsageError(
        f"'{module.__name__}' was already imported from {loaded}, so {source} is not used", where=where, fix=fix
    )


def _check_arguments(factory: Callable[..., Any], kwargs: dict[str, Any], *, where: str) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-ins have none
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        given = f"with {', '.join(sorted(kwargs))}" if kwargs else "without arguments"
        raise UsageError(f"the factory cannot be called {given}: {error}; it takes {signature}", where=where) from error


def _described(error: BaseException, file: Path | str | None) -> str:
    """Return `ValueError: text (model.py:12)`; the line is the deepest one in the user's file, else the deepest."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and Path(frame.filename) == Path(file)]
    if isinstance(error, SyntaxError) or not frames:
        return text
    frame = (own or list(frames))[-1]
    return f"{text} ({frame.filename}:{frame.lineno})"
