"""The library's log goes to Python's; what a caller needs from it is kept while it listens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from maseRT.errors import StepError

_LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}
_LAYER_LIST = "Layers:"
_REMINDER = "has Int64 binding"
"""In a warning of the parser about every int64 input, to whoever fills it: sessions go by the engine's own types."""


@dataclass
class Heard:
    """What was logged while somebody listened.

    Attributes:
        errors: every error message.
        warnings: every warning.
        layers: the last layer list of a build; "" where there was none.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: str = ""

    def why(self) -> str:
        """Return the errors as one text."""
        return "; ".join(self.errors) or "the library gave no reason"


@cache
def logger_for(trt: Any) -> Any:
    """Return this process's one logger for a library: it keeps the first one it is given."""
    target = logging.getLogger(f"maseRT.{trt.__name__}")

    class PythonLogger(trt.ILogger):  # type: ignore[misc]
        """Passes messages on to Python's logging."""

        def __init__(self) -> None:
            super().__init__()
            self.listener: Heard | None = None

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS.get(severity.name, logging.INFO) if _REMINDER not in message else logging.DEBUG
            target.log(level, "%s", message)
            if self.listener is None:
                return
            if level >= logging.ERROR:
                self.listener.errors.append(message)
            elif level >= logging.WARNING:
                self.listener.warnings.append(message)
            elif message.startswith(_LAYER_LIST):
                self.listener.layers = message

    return PythonLogger()


def make(trt: Any, name: str) -> Any:
    """Return a new `trt.Builder` or `trt.Runtime`.

    Raises:
        StepError: the library could not make one; has its reason.
    """
    with listening(trt) as heard:
        try:
            return getattr(trt, name)(logger_for(trt))
        except TypeError as error:  # what the bindings raise for a null pointer
            reason = "; ".join(heard.errors + heard.warnings) or str(error)
            raise StepError(f"no {name}: {reason}", where=f"{trt.__name__} {trt.__version__}") from error


@contextmanager
def listening(trt: Any) -> Iterator[Heard]:
    """Keep a library's errors and its layer list for the length of a block."""
    logger = logger_for(trt)
    before = logger.listener
    logger.listener = heard = Heard()
    try:
        yield heard
    finally:
        logger.listener = before
