"""The `masert` command: a thin shell around the steps. Only the cli modules print or exit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from maseRT import __version__, interrupts
from maseRT.cli_group import CommandLine, Reply, note, set_up_streams
from maseRT.cli_options import (
    ConfigOption,
    JsonOption,
    JunitOption,
    Options,
    OutputOption,
    RunOption,
    SetOption,
    on_a_run,
)
from maseRT.cli_outcomes import as_dict, shortfall, show, write_junit
from maseRT.cli_report import add_report_commands
from maseRT.errors import ExitCode, UsageError
from maseRT.workspace import DEFAULT_OUTPUT, Workspace

app = typer.Typer(
    name="masert",
    cls=CommandLine,
    help="From a trained PyTorch model to a fast, still accurate inference engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 internal bug, 2 usage or config, 3 something missing on this machine, "
    "4 a step failed, 5 a check failed, 130 interrupted, 143 terminated.",
)

STEP_HELP = {
    "train": "Train the float baseline (section \\[train]).",
    "quantize": "Give every layer its precision (section \\[quantize]).",
    "calibrate": "Find the ranges, compare the calibrators, keep the best (section \\[calibrate]).",
    "finetune": "Recover accuracy by quantization-aware training (section \\[finetune]).",
    "export": "Write the ONNX files, and check them (section \\[export]).",
    "build-engine": "Build the TensorRT engine (section \\[build-engine]).",
    "onnxruntime": "Make INT8, FP16 and optimized models for ONNX Runtime (section \\[onnxruntime]).",
}


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"masert {__version__}")
        raise typer.Exit


@app.command()
@on_a_run
def transform(
    options: Options,
    first: Annotated[str | None, typer.Option("--from", help="Start at this step.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Stop after this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and why.")] = False,
    junit: JunitOption = None,
) -> Reply:
    """Run all steps that the config has, in order, skipping what is done."""
    from maseRT.steps.table import get_step

    for name in (first, last):
        if name:
            get_step(name)
    with options.opened() as work:
        if dry_run:
            outcomes = work.preview(first=first, last=last)
            if not options.silent:
                for outcome in outcomes:
                    show(outcome)
        else:
            if junit is not None and (work.config.analyze is None or last not in (None, "analyze")):
                raise UsageError("there will be no report", where="--junit", fix="let analyze run, or leave it out")
            outcomes = work.transform(first=first, last=last, on_outcome=None if options.silent else show)
    if junit is not None and not dry_run:
        write_junit(junit, work.workspace.report, strict=options.strict)
    value = {"run": str(work.workspace.root), "steps": [as_dict(outcome) for outcome in outcomes]}
    return Reply(value, shortfall(outcomes, strict=options.strict))


def _add_step_command(name: str) -> None:
    @on_a_run
    def command(options: Options) -> Reply:
        return _single(name, options)

    app.command(name, help=STEP_HELP[name])(command)


def _single(name: str, options: Options, *, junit: Path | None = None) -> Reply:
    """Run one step, print its outcome, and return it."""
    from maseRT.steps.table import get_step

    with options.opened() as work:
        outcome = work.single(get_step(name))
        if not options.silent:
            show(outcome)
    if junit is not None:
        write_junit(junit, work.workspace.report, strict=options.strict)
    value = {"run": str(work.workspace.root), **as_dict(outcome), **outcome.summary}
    return Reply(value, shortfall([outcome], strict=options.strict))


for _name in STEP_HELP:
    _add_step_command(_name)


@app.command()
@on_a_run
def analyze(options: Options, junit: JunitOption = None) -> Reply:
    r"""Measure accuracy and speed of every runtime, and judge them (sections \[analyze], \[gate])."""
    return _single("analyze", options, junit=junit)


@app.command()
def explain(
    config: ConfigOption,
    layer: Annotated[str | None, typer.Argument(help="A layer, told with its kernels, or a pattern of names.")] = None,
    output: OutputOption = DEFAULT_OUTPUT,
    run: RunOption = None,
    set_: SetOption = None,
    against: Annotated[
        str | None, typer.Option("--against", help="A run of the same model in float: say what is slower in INT8.")
    ] = None,
    as_json: JsonOption = False,
) -> Reply:
    """Show each layer's precision: asked, exported and executed."""
    from maseRT.console import print_line, print_table
    from maseRT.steps.explain import explain as explained

    with Options(config, output, run, set_).opened() as work:
        other = None if against is None else Workspace(output, against)
        found = explained(work.config, work.workspace, layer=layer, against=other)
    if not as_json:
        for title, rows in found.tables:
            if title:
                print_line(f"\n{title}")
            print_table(rows)
        for remark in found.remarks:
            print_line(remark)
    return Reply({"run": str(work.workspace.root), **found.summary})


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="A zoo name or package.module:factory.")] = "digits-cnn",
    data: Annotated[str, typer.Option("--data", help="A data set's name or package.module:factory.")] = "digits",
    file: Annotated[Path, typer.Option("--file", help="Where to write it.")] = Path("masert.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: JsonOption = False,
) -> Reply:
    """Write a commented config for a model and a data set."""
    from maseRT.console import print_line
    from maseRT.scaffold import write_config

    write_config(file, model=model, data=data, overwrite=force)
    if not as_json:
        print_line(f"wrote {file}; run it with: masert transform --config {file}")
    return Reply({"file": str(file), "model": model, "data": data})


@app.command()
def doctor(as_json: JsonOption = False) -> Reply:
    """Say what is installed, and which runtimes can build and run here."""
    from maseRT.console import print_line, print_table
    from maseRT.doctor import examine

    findings = examine()
    if not as_json:
        for title, rows in findings.tables():
            print_line(title)
            print_table(rows)
            print_line("")
    return Reply(findings.as_dict())


@app.command("run")
def run_command(
    engine: Annotated[
        Path, typer.Option("--engine", help="A TensorRT engine, its sidecar beside it; or an ONNX file.")
    ],
    source: Annotated[Path, typer.Option("--input", help="An .npz file with an array per input.")],
    target: Annotated[Path, typer.Option("--output", help="The .npz file to write, with an array per output.")],
    device: Annotated[
        str | None, typer.Option("--device", help="Default: cuda:0; for ONNX files cpu, or openvino, cuda:N, ...")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Samples per inference; default: all.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Load an engine without a matching sidecar. An engine is code.")
    ] = False,
    as_json: JsonOption = False,
) -> Reply:
    """Run an engine or an ONNX file on arrays; needs TensorRT and cuda-python, or ONNX Runtime, but not torch."""
    from maseRT.console import print_line
    from maseRT.runtimes.npz import run_file

    outputs = run_file(engine, source, target, device=device, batch=batch, trust=trust)
    shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in outputs.items()}
    if not as_json:
        told = ", ".join(f"{name} {each['shape']} {each['dtype']}" for name, each in shapes.items())
        print_line(f"wrote {target}: {told}")
    return Reply({"output": str(target), "outputs": shapes})


@app.command("config")
def config_command(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check this file and print it resolved.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a config, for editors.")] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> Reply:
    """Check a config, or print the schema of all configs."""
    import json

    from maseRT.config import Config
    from maseRT.config_file import load_config
    from maseRT.console import print_line

    if schema:
        key, value = "json_schema", Config.model_json_schema(by_alias=True)
    elif config is not None:
        resolved = load_config(config, set_ or [])
        key, value = "config", resolved.model_dump(mode="json", by_alias=True, exclude_none=True)
    else:
        raise UsageError("nothing to do", where="masert config", fix="give --config FILE or --schema")
    if not as_json:
        print_line(json.dumps(value, indent=2))
    return Reply({key: value})


add_report_commands(app)


def main() -> NoReturn:
    """Run the command line, and end the process."""
    set_up_streams()
    interrupts.listen(note)
    try:
        app()
    except SystemExit as ending:
        if ending.code == ExitCode.INTERRUPTED:
            interrupts.end_process()
        raise
    sys.exit(ExitCode.DONE)


if __name__ == "__main__":
    main()
