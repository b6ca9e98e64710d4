"""The timing cache: measured kernel times that make the next build of the same engine faster."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maseRT.runtimes.trt.log import listening

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """A cache of this process, the configuration that may own it, and the digest of what was last written of it."""

    cache: Any
    config: Any
    digest: bytes


_WRITTEN: dict[tuple[str, Path], _Written] = {}
"""Library and file -> the cache that this process wrote there."""


class TimingCache:
    """A timing cache in a file, put into a builder's configuration.

    A file that another version or GPU wrote, or that is damaged, is replaced. A file that this process wrote itself is
    not read back, its cache is still there: TensorRT 8 deserialises none of its own ("myelinCache.h::
    deserializeFromBuffer"), so that there a cache speeds up the builds of one process only; 10 does.

    Attributes:
        kept: there is a file to keep it in.
        found: the file was there, and fitted.
    """

    def __init__(self, trt: Any, config: Any, path: Path | None) -> None:
        self._trt = trt
        self._config = config
        self._path = path
        self._refused = ""
        self.kept, self.found = path is not None, False
        if path is None:
            return
        content = path.read_bytes() if path.is_file() else b""
        written = _WRITTEN.get((trt.__name__, path))
        if content and written and written.digest == _digest(content) and not self._use(lambda: written.cache):
            self.found = True
        elif content:
            self._refused = self._use(lambda: config.create_timing_cache(content))
            self.found = not self._refused
            if self._refused:
                log.info("the timing cache %s does not fit (%s): started a new one", path, self._refused)
        if not self.found:
            self._use(lambda: config.create_timing_cache(b""))

    def save(self) -> list[str]:
        """Write the file, in one piece, and return what the user should know."""
        if self._path is None:
            return []
        # Not imported above: an engine runs without the packages that the workspace needs.
        from maseRT.workspace import atomic_path

        cache = self._config.get_timing_cache()
        content = bytes(memoryview(cache.serialize()))
        with atomic_path(self._path) as temporary:
            temporary.write_bytes(content)
        _WRITTEN[self._trt.__name__, self._path] = _Written(cache, self._config, _digest(content))
        return [f"the timing cache {self._path.name} {_why_replaced(self._refused)}"] if self._refused else []

    def _use(self, make: Callable[[], Any]) -> str:
        """Put a cache into the configuration; return why the library did not take it as it is, "" if it did."""
        with listening(self._trt) as heard:
            try:
                cache = make()
                taken = cache is not None and self._config.set_timing_cache(cache, ignore_mismatch=False)
            except Exception as error:  # the bindings raise RuntimeError or TypeError for what does not deserialise
                return "; ".join([*heard.errors, str(error)])
        # Some versions log that they could not read it, and go on with an empty one.
        complaints = [each for each in heard.errors + heard.warnings if "timing cache" in each.lower()]
        if not taken or complaints:
            return "; ".join(heard.errors or complaints) or "written by another version or for another GPU"
        return ""


def _why_replaced(refused: str) -> str:
    if "myelin" in refused.lower():
        return "was started anew: TensorRT 8 cannot read back what an earlier process wrote, TensorRT 10 can"
    return f"did not fit and was replaced: {refused}"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
