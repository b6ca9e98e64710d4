"""A config is checked as a whole, and its mistakes are told in the words of the file."""

from pathlib import Path

import pytest

from maseRT.config import Config, MethodRule, Percentile
from maseRT.config_file import load_config
from maseRT.errors import ConfigError, ExitCode, UsageError
from maseRT.precision import Precision

GOOD = """
[model]
name = "digits-cnn"
[data]
name = "digits"
[train]
epochs = 3
learning_rate = 1e-3
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return _write


def problems(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.problems


def test_sections_are_typed_and_frozen(write):
    config = load_config(
        write(GOOD + '[quantize]\nprecision = "fp16"\n[export]\n[build-engine]\nbatch = { opt = 8, max = 8 }')
    )
    assert config.quantize.precision is Precision.FP16
    assert config.build_engine.batch.opt == 8
    with pytest.raises(ValueError, match="frozen"):
        config.data.batch_size = 3


def test_all_mistakes_are_reported_at_once_with_the_nearest_spelling(write):
    found = problems(
        write(
            GOOD
            + """
            [data2]
            [quantize]
            precison = "int8"
            float = "fp61"
            rules = [{ nam = "conv*", precision = "int8" }]
            [finetune]
            epochs = "two"
            """
        )
    )
    text = "\n".join(found)
    assert "quantize.precison: unknown key; did you mean 'precision'?" in found
    assert "quantize.float: 'fp61' is not valid; did you mean 'fp16'?" in found
    assert "quantize.rules[0].nam: unknown key; did you mean 'name'?" in found
    assert "unknown section [data2]; did you mean 'data'?" in found
    assert "finetune.epochs: input should be a valid integer" in text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"entropie"', "did you mean 'entropy'?"),
        ("{ percentil = 3 }", "percentile: is missing"),
        ("{ percentile = 101 }", "less than or equal to 100"),
        ('{ method = "max" }', "a rule needs one of name"),
        ('{ regex = "(", method = "max" }', "not a regular expression"),
        ('{ name = "a", method = "mx" }', "did you mean 'max'?"),
    ],
)
def test_a_wrong_calibration_method_gets_one_line_of_its_own_form(write, entry, message):
    text = GOOD + f'[quantize]\n[calibrate]\nmethods = ["max", {entry}]'
    found = problems(write(text))
    assert any(message in line for line in found)
    assert all("calibrate.methods[1]" in line for line in found)


def test_percentile_lists_and_layer_rules(write):
    methods = '["mse", { percentile = [99, 99.9] }, { type = "Linear", method = { percentile = 50 } }]'
    config = load_config(write(GOOD + f"[quantize]\n[calibrate]\nmethods = {methods}"))
    assert config.calibrate.methods[:3] == ("mse", Percentile(percentile=99), Percentile(percentile=99.9))
    rule = config.calibrate.methods[3]
    assert isinstance(rule, MethodRule)
    assert rule.describe() == 'type = "Linear"'


def test_only_layer_rules_leave_the_other_layers_without_a_method(write):
    text = GOOD + '[quantize]\n[calibrate]\nmethods = [{ name = "a", method = "max" }]'
    assert any("at least one method" in line for line in problems(write(text)))


def test_a_wrong_entry_does_not_make_its_list_too_short(write):
    assert problems(write(GOOD + '[onnxruntime]\nmodes = ["optimised"]')) == (
        "onnxruntime.modes[0]: 'optimised' is not valid; did you mean 'optimized'?",
    )


def test_modes_of_onnxruntime_are_one_at_least_and_each_once(write):
    assert problems(write(GOOD + "[onnxruntime]\nmodes = []")) == ("onnxruntime.modes: needs at least one entry",)
    found = problems(write(GOOD + '[onnxruntime]\nmodes = ["qdq", "static", "qdq"]'))
    assert found == ("onnxruntime.modes: 'qdq' is there twice",)


def test_a_wrong_device_of_onnxruntime_gets_the_right_ones(write):
    for wrong in ("gpu", "cpu:3"):
        (found,) = problems(write(GOOD + f'[onnxruntime]\ndevice = "{wrong}"'))
        assert f"'{wrong}' is not valid: auto, cpu, cuda" in found


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_opset_outside_the_window(write, opset):
    (line,) = problems(write(GOOD + f"[quantize]\n[export]\nopset = {opset}"))
    assert line.startswith("export.opset: ")


def test_unknown_runtime(write):
    (line,) = problems(write(GOOD + '[quantize]\n[analyze]\nruntimes = ["tensort"]'))
    assert line.endswith("did you mean 'tensorrt'?")


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ("[export]", "[export] needs [quantize]: add it"),
        ("[quantize]\n[build-engine]", "[build-engine] needs [export]: add it"),
        ("[quantize]\n[gate]", "[gate] needs [analyze]: add it"),
    ],
)
def test_a_section_that_needs_another(write, sections, needed):
    assert problems(write(GOOD + sections)) == (needed,)


def test_weights_must_come_from_somewhere(write):
    bare = GOOD.partition("[train]")[0]
    (line,) = problems(write(bare))
    assert "random_weights" in line
    assert load_config(write(bare), ["model.random_weights=true"]).train is None


def test_learned_ranges_need_the_native_backend(write):
    sections = '[quantize]\nbackend = "pytorch-quantization"\n[calibrate]\n[finetune]\nlearned_amax = true\n'
    (line,) = problems(write(GOOD + sections))
    assert line.startswith('[finetune] learned_amax needs [quantize] backend = "native"')


def test_profile_must_be_ordered(write):
    text = GOOD + "[quantize]\n[export]\n[build-engine]\nbatch = { min = 8, opt = 4, max = 16 }"
    assert any("min <= opt <= max" in line for line in problems(write(text)))


@pytest.mark.parametrize(
    "mistake",
    [
        "gate.max_latency_ms=inf",
        "gate.max_latency_ms=1e400",
        "gate.max_latency_ms=nan",
        "train.learning_rate=inf",
        "run.seed=9223372036854775808",
        "run.threads=100000",
        "analyze.runtimes=[]",
    ],
)
def test_what_no_machine_can_do_is_refused(write, mistake):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), [mistake])
    assert any(mistake.partition("=")[0] in line for line in caught.value.problems)


@pytest.mark.parametrize("std", ["[0.0]", "[-0.5]", "[nan]", "[inf]"])
def test_a_std_is_a_positive_number(write, std):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), ["data.mean=[0.5]", f"data.std={std}"])
    assert any("data.std" in line for line in caught.value.problems)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("{ over = 'torch-fp32', ratio = 0 }", "gate.min_speedup.ratio: input should be greater than 0, got 0"),
        ("[{ over = 'torch-fp32', ratio = 0 }]", "gate.min_speedup[0].ratio: input should be greater than 0, got 0"),
        ("{ over = 'torch-fp32', ration = 2 }", "gate.min_speedup.ration: unknown key; did you mean 'ratio'?"),
    ],
)
def test_a_wrong_speedup_is_told_as_it_was_written(write, value, line):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), [f"gate.min_speedup={value}"])
    assert line in caught.value.problems


def test_a_file_of_windows_is_read(write):
    path = write("")
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(path) == load_config(write(GOOD))


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "9" * 5000])
def test_a_value_that_python_cannot_read_is_no_bug(write, value):
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(write(GOOD + f"[export]\nopset = {value}\n"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(write(GOOD), [f"export.opset={value}"])


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="no such config file"):
        load_config(tmp_path / "none.toml")


def test_syntax_error_names_the_line(write):
    with pytest.raises(UsageError, match="line 3"):
        load_config(write('[model]\nname = "a"\nbroken ='))


def test_overrides_are_toml_values_or_words(write):
    path = write(GOOD)
    config = load_config(path, ["data.batch_size=8", "model.name=vgg7", "quantize.rules=[{last=1, precision='fp32'}]"])
    assert (config.data.batch_size, config.model.name, config.quantize.rules[0].last) == (8, "vgg7", 1)


@pytest.mark.parametrize("override", ["batch_size=3", "data.batch_size", "=3", "data.=3"])
def test_malformed_override(write, override):
    with pytest.raises(UsageError, match=r"section\.key=value"):
        load_config(write(GOOD), [override])


def test_an_override_whose_quotes_the_shell_took_says_so(write):
    with pytest.raises(UsageError, match=r"\[batch,height\] is not TOML") as caught:
        load_config(write(GOOD), ["export.dynamic=[batch,height]"])
    assert "--set 'export.dynamic=" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("model.task", "segmentation", "model.task: 'segmentation' is not valid: .*regression, or module:function"),
        ("data.mean", "0.5", r"data\.mean: should be a list, in \[brackets\], got 0\.5"),
        ("analyze.runtimes", "torch", r'analyze\.runtimes: should be a list, in \[brackets\], got "torch"'),
    ],
)
def test_a_value_of_another_form_is_told_in_words_of_the_file(write, key, value, line):
    with pytest.raises(ConfigError, match=line):
        load_config(write(GOOD), [f"{key}={value}"])


def test_schema_knows_the_sections_as_the_file_spells_them():
    properties = Config.model_json_schema(by_alias=True)["properties"]
    assert {"model", "build-engine", "finetune"} <= set(properties)


def test_free_image_sizes_need_profiles(write):
    text = GOOD + '[quantize]\n[export]\ndynamic = ["batch", "height", "width"]\n'
    assert load_config(write(text)).export.dynamic == ("batch", "height", "width")
    (line,) = problems(write(text + "[build-engine]\n"))
    assert "leaves the height and width free: give the sizes in [build-engine] profiles" in line
    profile = "{ input = { min = [1, 1, 8, 8], opt = [1, 1, 8, 8], max = [8, 1, 32, 32] } }"
    assert load_config(write(f"{text}[build-engine]\nprofiles = [{profile}]")).build_engine.profiles
    (line,) = problems(write(GOOD + '[quantize]\n[export]\ndynamic = ["height"]'))
    assert "the batch always stays free" in line
