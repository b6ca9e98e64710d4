"""The timing cache: measured kernel times that make the next build of the same engine faster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from maseRT.runtimes.trt.log import listening

log = logging.getLogger(__name__)


class TimingCache:
    """A timing cache in a file, put into a builder's configuration.

    A file that another version or GPU wrote, or that is damaged, is replaced.

    Attributes:
        kept: there is a file to keep it in.
        found: the file was there, and fitted.
    """

    def __init__(self, trt: Any, config: Any, path: Path | None) -> None:
        self._trt = trt
        self._config = config
        self._path = path
        self._replaced = False
        self.kept, self.found = path is not None, False
        if path is None:
            return
        content = path.read_bytes() if path.is_file() else b""
        if content and not self._use(content):
            self._replaced = True
            log.warning("the timing cache %s does not fit this library and GPU: started a new one", path)
            content = b""
        self.found = bool(content)
        if not content:
            self._use(b"")

    def save(self) -> list[str]:
        """Write the file, in one piece, and return what the user should know."""
        if self._path is None:
            return []
        # Not imported above: an engine runs without the packages that the workspace needs.
        from maseRT.workspace import atomic_path

        with atomic_path(self._path) as temporary:
            temporary.write_bytes(memoryview(self._config.get_timing_cache().serialize()))
        return [f"the timing cache {self._path.name} did not fit and was replaced"] if self._replaced else []

    def _use(self, content: bytes) -> bool:
        """Put a cache into the configuration; tell whether the library took it as it is."""
        with listening(self._trt) as heard:
            try:
                cache = self._config.create_timing_cache(content)
                taken = cache is not None and self._config.set_timing_cache(cache, ignore_mismatch=False)
            except Exception as error:  # the bindings raise RuntimeError or TypeError for what does not deserialise
                log.debug("timing cache refused: %s", error)
                return False
        # Some versions log that they could not read it, and go on with an empty one.
        return bool(taken) and not any("timing cache" in each.lower() for each in heard.errors + heard.warnings)
