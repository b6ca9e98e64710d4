import subprocess
import sys

from maseRT.user_code import code_files


def names(files, folder):
    return sorted(str(file.relative_to(folder)) for file in files)


def test_module_does_not_import_torch():
    code = "import sys, maseRT.user_code; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_module_imports_counts_wherever_the_import_stands(write, tmp_path):
    write("net.py", "import os, torch\nimport blocks\nfrom layers import conv\ndef make():\n    import late")
    write("blocks.py", "import deep.down")
    write("deep/__init__.py", "")
    write("deep/down.py", "raise RuntimeError('imported')")
    write("layers.py", "import net")
    write("late.py", "")
    write("unrelated.py", "")
    assert names(code_files("net"), tmp_path) == [
        "blocks.py",
        "deep/__init__.py",
        "deep/down.py",
        "late.py",
        "layers.py",
        "net.py",
    ]


def test_relative_imports_and_parents_of_a_package(write, tmp_path):
    write("pack/__init__.py", "from . import config")
    write("pack/config.py", "")
    write("pack/models/__init__.py", "from .net import make")
    write("pack/models/net.py", "from ..parts.conv import Conv\nfrom .. import util")
    write("pack/parts/conv.py", "")
    write("pack/util.py", "")
    write("pack/models/other.py", "")
    everything = ["__init__", "config", "models/__init__", "models/net", "parts/conv", "util"]
    assert names(code_files("pack.models"), tmp_path) == sorted(f"pack/{name}.py" for name in everything)


def test_libraries_are_not_followed(write, tmp_path):
    write("net.py", "import torch, json\nfrom maseRT.tasks import Task")
    write("venv/lib/python3.11/site-packages/lib.py", "")
    assert names(code_files("net"), tmp_path) == ["net.py"]
    assert [file.name for file in code_files("json.decoder")] == ["decoder.py"]


def test_code_that_is_not_python_or_not_there_ends_the_search(write, tmp_path):
    write("net.py", "import broken\nfrom ..... import above\nimport not_there_at_all")
    write("broken.py", "def make(:")
    assert names(code_files("net"), tmp_path) == ["broken.py", "net.py"]
    assert code_files("not_there_at_all") == []
    assert code_files("sys") == []
