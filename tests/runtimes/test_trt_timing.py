"""The timing cache's file over several builds, with libraries that behave as TensorRT 8.6.1 and 10 do."""

from types import SimpleNamespace

import pytest

from maseRT.runtimes.trt.log import logger_for
from maseRT.runtimes.trt.timing import TimingCache


class Library:
    """TensorRT 8 deserialises no timing cache that holds anything, TensorRT 10 its own."""

    class ILogger:
        pass

    def __init__(self, version="8"):
        self.__name__ = f"library{version}"
        self.version = version.encode()

    def config(self):
        return Config(self)


class Config:
    def __init__(self, library):
        self.library = library
        self.cache = None

    def create_timing_cache(self, content):
        if content and self.library.version == b"8":
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


def written_by_another_process(path, version):
    """What a process has written, in a file of a name that this one does not know."""
    build(Library(version), path, b"a")
    return path.rename(path.with_name("other.cache"))


def test_another_process_reads_the_file(path):
    other = written_by_another_process(path, "10")
    assert build(Library("10"), other, b"b") == (True, [])
    assert other.read_bytes() == b"10ab"


def test_tensorrt_8_starts_anew_in_another_process_and_says_why(path):
    other = written_by_another_process(path, "8")
    found, (note,) = build(Library("8"), other, b"b")
    assert not found
    assert note.startswith("the timing cache other.cache was started anew: TensorRT 8 cannot read back")
    assert other.read_bytes() == b"8b"


def test_a_file_that_somebody_else_changed_is_read_again(path):
    library = Library("10")
    build(library, path, b"a")
    path.write_bytes(b"10xyz")
    assert build(library, path, b"b") == (True, [])
    assert path.read_bytes() == b"10xyzb"


def test_a_file_of_another_version_is_replaced(path):
    path.write_bytes(b"8abc")
    found, (note,) = build(Library("10"), path, b"d")
    assert not found
    assert note.endswith("replaced: written by another version or for another GPU")
    assert path.read_bytes() == b"10d"


def test_without_a_file_nothing_is_kept():
    config = Library().config()
    timing = TimingCache(Library(), config, None)
    assert (timing.kept, timing.found, timing.save(), config.cache) == (False, False, [], None)
