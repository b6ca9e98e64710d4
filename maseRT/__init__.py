"""maseRT: from a trained PyTorch model to a fast, still accurate inference engine.

Importing this package loads neither torch nor any vendor library; the steps do, when they run.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("maseRT")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
