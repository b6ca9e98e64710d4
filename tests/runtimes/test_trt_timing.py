"""The timing cache's file over several builds, with a library that behaves as TensorRT 8.6.1 was seen to."""

from types import SimpleNamespace

import pytest

from maseRT.runtimes.trt.log import logger_for
from maseRT.runtimes.trt.timing import TimingCache


class Library:
    """Timing caches that can be deserialised in a new process only: not once something was built."""

    class ILogger:
        pass

    def __init__(self, version="8"):
        self.__name__ = f"library{version}"
        self.version = version.encode()
        self.built = False

    def config(self):
        return Config(self)


class Config:
    def __init__(self, library):
        self.library = library
        self.cache = None

    def create_timing_cache(self, content):
        if content and self.library.built:
            logger_for(self.library).log(SimpleNamespace(name="ERROR"), "Myelin error from unknown graph")
            logger_for(self.library).log(SimpleNamespace(name="ERROR"), "The timing cache will not be used!")
            return Cache(self.library.version)
        return Cache(content or self.library.version)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return ignore_mismatch or cache.content.startswith(self.library.version)

    def get_timing_cache(self):
        return self.cache

    def build(self, tactic):
        self.library.built = True
        self.cache.content += tactic


class Cache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content


def build(library, path, tactic=b""):
    config = library.config()
    timing = TimingCache(library, config, path)
    config.build(tactic)
    return timing.found, timing.save()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "timing.cache"


def test_a_process_goes_on_with_its_own_cache(path):
    library = Library()
    assert build(library, path, b"a") == (False, [])
    assert build(library, path, b"b") == (True, [])
    assert build(library, path, b"c") == (True, [])
    assert path.read_bytes() == b"8abc"


def test_another_process_reads_the_file(path):
    build(Library(), path, b"a")
    path.rename(path.with_name("other.cache"))
    other = path.with_name("other.cache")
    assert build(Library(), other, b"b") == (True, [])
    assert other.read_bytes() == b"8ab"


def test_a_file_that_somebody_else_changed_is_read_again(path):
    library = Library()
    build(library, path, b"a")
    path.write_bytes(b"8xyz")
    found, notes = build(library, path)
    assert not found
    assert notes == [
        "the timing cache timing.cache did not fit and was replaced: "
        "Myelin error from unknown graph; The timing cache will not be used!"
    ]


def test_a_file_of_another_version_is_replaced(path):
    path.write_bytes(b"7abc")
    found, (note,) = build(Library(), path, b"d")
    assert not found
    assert note.endswith("replaced: written by another version or for another GPU")
    assert path.read_bytes() == b"8d"


def test_without_a_file_nothing_is_kept():
    config = Library().config()
    timing = TimingCache(Library(), config, None)
    assert (timing.kept, timing.found, timing.save(), config.cache) == (False, False, [], None)
