import subprocess
import sys

import pytest

from maseRT.errors import MissingError, UsageError
from maseRT.factories import call_factory, is_factory, load_factory, load_module, module_source


def test_module_does_not_import_torch():
    code = "import sys, maseRT.factories; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["digits", "a:", ":b", "a b:c", "a:b:c", "a/b.py:c", "a..b:c", "1a:b", ""])
def test_other_forms_have_no_source_and_an_error(name):
    assert not is_factory(name)
    with pytest.raises(UsageError, match=r"not package\.module:factory"):
        load_factory(name, what="model")


def test_source_is_found_without_importing(write):
    path = write("pack/__init__.py", "raise RuntimeError('imported')").parent
    module = write("pack/inner/deep.py", "raise RuntimeError('imported')")
    write("pack/inner/__init__.py", "raise RuntimeError('imported')")
    assert module_source("pack.inner.deep") == module
    assert module_source("pack") == path / "__init__.py"
    assert "pack" not in sys.modules


def test_source_below_directories_without_init(write):
    module = write("space/inner/deep.py", "")
    assert module_source("space.inner.deep") == module
    assert module_source("space.inner") is None


def test_source_of_an_installed_package_and_of_nothing(write):
    source = module_source("json.decoder")
    assert source is not None
    assert source.name == "decoder.py"
    assert module_source("sys") is None
    assert module_source("no_such_module_here") is None
    assert module_source("json.no_such_part") is None
    assert module_source("json.decoder.JSONDecoder") is None


def test_loads_from_the_working_directory_what_was_just_written(write):
    write("fresh_factory.py", "import fresh_helper\ndef make(width=3):\n    return fresh_helper.VALUE * width")
    write("fresh_helper.py", "VALUE = 7")
    assert load_factory("fresh_factory:make", what="model")() == 21
    assert call_factory("fresh_factory:make", what="model", width=2) == 14


def test_a_late_import_inside_the_factory_finds_its_neighbour(write):
    write("late_factory.py", "def make():\n    import late_helper\n    return late_helper.VALUE")
    write("late_helper.py", "VALUE = 5")
    assert call_factory("late_factory:make", what="model") == 5


def test_a_factory_may_be_a_class_or_a_method(write):
    write("class_factory.py", "class Net:\n    @classmethod\n    def small(cls):\n        return cls()")
    assert type(call_factory("class_factory:Net", what="model")).__name__ == "Net"
    assert type(call_factory("class_factory:Net.small", what="model")).__name__ == "Net"


def test_missing_module_suggests_a_neighbour(write):
    write("my_models.py", "")
    with pytest.raises(UsageError, match=r"no module 'my_model' .*did you mean 'my_models'\?") as caught:
        load_factory("my_model:make", what="model")
    assert caught.value.where == "model 'my_model:make'"
    assert "my_model" in caught.value.fix


def test_missing_submodule_is_named(write):
    write("known/__init__.py", "")
    with pytest.raises(UsageError, match=r"no module 'known\.part'"):
        load_factory("known.part:make", what="model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import torch_that_is_not_there",
            r"raised ModuleNotFoundError: No module named 'torch_that_is_not_there' \(.*:1\)",
        ),
        ("x = 1\nx / 0", r"raised ZeroDivisionError: division by zero \(.*broken_module\.py:2\)"),
        ("def make(:", r"raised SyntaxError: .*broken_module\.py, line 1"),
        ("import sys\nsys.exit(3)", r"raised SystemExit: 3 \(.*:2\)"),
    ],
)
def test_import_that_raises(write, text, message):
    write("broken_module.py", text)
    with pytest.raises(UsageError, match=message):
        load_factory("broken_module:make", what="model")


def test_missing_attribute_suggests_the_nearest(write):
    write("attribute_module.py", "def make_model():\n    pass\nclass Net:\n    pass")
    with pytest.raises(UsageError, match=r"no 'make_modle'; did you mean 'make_model'\?"):
        load_factory("attribute_module:make_modle", what="model")
    with pytest.raises(UsageError, match=r"has no 'EXACT'$"):  # with dozens of names, none of them near
        load_factory("token:EXACT", what="model")
    with pytest.raises(UsageError, match="has no 'small'"):
        load_factory("attribute_module:Net.small", what="model")


def test_not_callable(write):
    write("value_module.py", "make = 3")
    with pytest.raises(UsageError, match="'make' is not callable, it is of type int"):
        load_factory("value_module:make", what="data set")


def test_factory_that_raises_names_the_line_in_the_users_file(write):
    path = write("raising_module.py", "import json\ndef make():\n    return json.loads('{')")
    with pytest.raises(UsageError, match=r"factory raised JSONDecodeError: .*raising_module\.py:3\)") as caught:
        call_factory("raising_module:make", what="model")
    assert str(path) in str(caught.value)
    write("exiting_module.py", "def make():\n    raise SystemExit(1)")
    with pytest.raises(UsageError, match="factory raised SystemExit: 1"):
        call_factory("exiting_module:make", what="model")


def test_an_error_of_our_own_passes_through(write):
    write("own_error.py", "from maseRT.errors import MissingError\ndef make():\n    raise MissingError('no h5py')")
    with pytest.raises(MissingError, match="no h5py"):
        call_factory("own_error:make", what="model")


def test_arguments_that_do_not_fit(write):
    write("picky_module.py", "def make(depth):\n    raise TypeError('inner')")
    with pytest.raises(UsageError, match="cannot be called without arguments: missing a required argument: 'depth'"):
        call_factory("picky_module:make", what="model")
    with pytest.raises(UsageError, match="cannot be called with breadth: "):
        call_factory("picky_module:make", what="model", breadth=1)
    with pytest.raises(UsageError, match="factory raised TypeError: inner"):
        call_factory("picky_module:make", what="model", depth=1)


def test_a_file_that_an_imported_module_hides_is_refused(write):
    path = write("json.py", "def make():\n    pass")
    assert module_source("json") == path
    with pytest.raises(UsageError, match=r"'json' was already imported from .*json\.py is not used"):
        load_factory("json:make", what="model")


def test_a_module_of_its_own(write):
    path = write("plug_module.py", "VALUE = 4")
    assert module_source("plug_module") == path
    assert module_source("plug_module:make") is None
    assert module_source("") is None
    assert load_module("plug_module", where="[quantize] plugins").VALUE == 4
    with pytest.raises(UsageError, match="no module 'absent_module'") as caught:
        load_module("absent_module", where="[quantize] plugins")
    assert caught.value.where == "[quantize] plugins"
