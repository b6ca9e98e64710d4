"""The keys of [build-engine], from the TOML to what a compiler is given."""

from pathlib import Path

import pytest
from projects import UNTRAINED

from maseRT.config_file import load_config
from maseRT.errors import ConfigError
from maseRT.runtimes.base import BatchRange, ShapeRange
from maseRT.steps.build_engine import build_options

HEAD = (
    UNTRAINED
    + """
[quantize]
[export]
[build-engine]
"""
)


@pytest.fixture
def options(tmp_path):
    def options(text, *, device="cuda:0"):
        path = tmp_path / "run.toml"
        path.write_text(HEAD + text)
        return build_options(load_config(path).build_engine, device, timing_caches=Path("own"))

    return options


def test_the_defaults(options):
    found = options("")
    assert found.batch == BatchRange(1, 64, 64)
    assert (found.profiles, found.tactic_sources, found.workspace_mb) == ((), None, None)
    assert found.timing_caches == Path("own")
    assert found.tf32
    assert (found.reproducible, found.refit, found.strip) == (False, False, False)


def test_every_key_reaches_the_compiler(options):
    found = options(
        """
        batch = { min = 2, opt = 4, max = 8 }
        workspace_mb = 512
        optimization_level = 5
        tf32 = false
        timing_caches = "shared"
        reproducible = true
        tactic_sources = ["JIT_CONVOLUTIONS"]
        version_compatible = true
        hardware_compatible = true
        refit = true
        strip = true
        max_threads = 3
        compute_capability = "8.9"
        """
    )
    assert found.batch == BatchRange(2, 4, 8)
    assert (found.workspace_mb, found.optimization_level, found.max_threads) == (512, 5, 3)
    assert found.timing_caches == Path("shared")
    assert found.tactic_sources == ("JIT_CONVOLUTIONS",)
    assert found.compute_capability == "8.9"
    assert not found.tf32
    flags = (found.reproducible, found.version_compatible, found.hardware_compatible, found.refit, found.strip)
    assert flags == (True,) * 5


def test_profiles_in_full(options):
    found = options(
        """
        [[build-engine.profiles]]
        input = { min = [1, 3, 32, 32], opt = [8, 3, 224, 224], max = [8, 3, 256, 256] }
        [[build-engine.profiles]]
        input = { min = [64, 3, 224, 224], opt = [64, 3, 224, 224], max = [64, 3, 224, 224] }
        """
    )
    one = (64, 3, 224, 224)
    assert found.profiles == (
        {"input": ShapeRange((1, 3, 32, 32), (8, 3, 224, 224), (8, 3, 256, 256))},
        {"input": ShapeRange(one, one, one)},
    )


@pytest.mark.parametrize(("device", "built_on"), [("cpu", "cuda:0"), ("cuda:1", "cuda:1")])
def test_an_engine_is_built_on_a_gpu(options, device, built_on):
    assert options("", device=device).device == built_on


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optimization_level = 6", "optimization_level"),
        ("workspace_mb = 0", "workspace_mb"),
        ("max_threads = 0", "max_threads"),
        ('compute_capability = "sm89"', "compute_capability"),
        ('tactic_sources = "CUBLAS"', "tactic_sources"),
        ('on_mismatch = "ignore"', "on_mismatch"),
        ("profiles = [{ input = { min = [2], opt = [1], max = [3] } }]", "min <= opt <= max"),
        ("profiles = [{ input = { min = [1, 2], opt = [1], max = [3] } }]", "min <= opt <= max"),
        ("workspace = 5", "workspace_mb"),
    ],
)
def test_mistakes_are_named(options, text, named):
    with pytest.raises(ConfigError) as caught:
        options(text)
    assert any(named in line for line in caught.value.problems)
