"""The `masert` command: a thin shell around the steps, and the only module that exits."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from maseRT import __version__
from maseRT.errors import ExitCode, MaseRTError

if TYPE_CHECKING:
    from maseRT.steps.pipeline import Outcome, Run

app = typer.Typer(
    name="masert",
    help="From a trained PyTorch model to a fast, still accurate inference engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 internal bug, 2 usage or config, 3 something missing on this machine, "
    "4 a step failed, 5 a check failed, 130 interrupted, 143 terminated.",
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run's TOML file.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where the output tree grows.")]
RunOption = Annotated[str | None, typer.Option("--run", help="The run's name; default: the config's.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, instead of the config's.")]
LoadOption = Annotated[Path | None, typer.Option("--load", help="Trained weights, instead of [model] checkpoint.")]
LoadTypeOption = Annotated[
    str | None, typer.Option("--load-type", help="pl, pt, safetensors or pytorch-quantization; told from the file.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Run what is already done, too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say everything, on stderr.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="A runtime that cannot run here ends with exit code 3.")]

STEP_HELP = {
    "train": "Train the float baseline (section \\[train]).",
    "quantize": "Give every layer its precision (section \\[quantize]).",
    "calibrate": "Find the ranges, compare the calibrators, keep the best (section \\[calibrate]).",
    "finetune": "Recover accuracy by quantization-aware training (section \\[finetune]).",
    "export": "Write the ONNX files, and check them (section \\[export]).",
    "build-engine": "Build the TensorRT engine (section \\[build-engine]).",
    "onnxruntime": "Make INT8, FP16 and optimized models for ONNX Runtime (section \\[onnxruntime]).",
    "analyze": "Measure accuracy and speed of every runtime (section \\[analyze]).",
}


@dataclass(frozen=True)
class Options:
    """The options that all commands on a run share."""

    config: Path
    output: Path
    run: str | None
    overrides: list[str] = field(default_factory=list)
    load: Path | None = None
    load_type: str | None = None
    force: bool = False
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def open(self) -> Run:
        """Read the config and return the run it describes."""
        from maseRT.config import load_config
        from maseRT.console import RichReporter, err
        from maseRT.progress import Silent
        from maseRT.steps.pipeline import Run
        from maseRT.workspace import Workspace

        overrides = list(self.overrides)
        if self.load is not None:
            overrides.append(f"model.checkpoint={str(self.load)!r}")
        if self.load_type is not None:
            overrides.append(f"model.kind={self.load_type}")
        return Run(
            config=load_config(self.config, overrides),
            config_path=self.config,
            workspace=Workspace(self.output, self.run or self.config.stem),
            reporter=RichReporter() if err.is_terminal and not self.quiet else Silent(),
            force=self.force,
        )


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"masert {__version__}")
        raise typer.Exit


@app.command()
def transform(
    config: ConfigOption,
    output: OutputOption = Path("mase_output"),
    run: RunOption = None,
    set_: SetOption = None,
    load: LoadOption = None,
    load_type: LoadTypeOption = None,
    first: Annotated[str | None, typer.Option("--from", help="Start at this step.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Stop after this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and why.")] = False,
    force: ForceOption = False,
    strict: StrictOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run all steps that the config has, in order, skipping what is done."""
    options = Options(config, output, run, set_ or [], load, load_type, force, as_json, quiet, verbose)
    with _guarded("transform", options):
        from maseRT.console import print_json
        from maseRT.steps.table import get_step

        for name in (first, last):
            if name:
                get_step(name)
        work = options.open()
        if dry_run:
            outcomes = work.preview(first=first, last=last)
            for outcome in outcomes:
                _show(outcome, options)
        else:
            outcomes = work.transform(first=first, last=last, on_outcome=lambda outcome: _show(outcome, options))
        if as_json:
            print_json("transform", {"run": str(work.workspace.root), "steps": [_as_dict(o) for o in outcomes]})
        if strict:
            _require_all_rows(outcomes)


def _add_step_command(name: str) -> None:
    def command(
        config: ConfigOption,
        output: OutputOption = Path("mase_output"),
        run: RunOption = None,
        set_: SetOption = None,
        load: LoadOption = None,
        load_type: LoadTypeOption = None,
        force: ForceOption = False,
        strict: StrictOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        options = Options(config, output, run, set_ or [], load, load_type, force, as_json, quiet, verbose)
        with _guarded(name, options):
            from maseRT.console import print_json
            from maseRT.steps.table import get_step

            work = options.open()
            outcome = work.single(get_step(name))
            _show(outcome, options)
            if as_json:
                print_json(name, {"run": str(work.workspace.root), **_as_dict(outcome), **outcome.summary})
            if strict:
                _require_all_rows([outcome])

    app.command(name, help=STEP_HELP[name])(command)


for _name in STEP_HELP:
    _add_step_command(_name)


@app.command()
def explain(
    config: ConfigOption,
    layer: Annotated[str | None, typer.Argument(help="A layer, told with its kernels, or a pattern of names.")] = None,
    output: OutputOption = Path("mase_output"),
    run: RunOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show each layer's precision: asked, exported and executed."""
    options = Options(config, output, run, set_ or [], as_json=as_json)
    with _guarded("explain", options):
        from maseRT.console import print_json, print_line, print_table
        from maseRT.steps.explain import explain as explained

        work = options.open()
        found = explained(work.config, work.workspace, layer=layer)
        if as_json:
            print_json("explain", {"run": str(work.workspace.root), **found.summary})
            return
        for title, rows in found.tables:
            if title:
                print_line(f"\n{title}")
            print_table(rows)
        for remark in found.remarks:
            print_line(remark)


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="A zoo name or package.module:factory.")] = "digits-cnn",
    data: Annotated[str, typer.Option("--data", help="A data set's name or package.module:factory.")] = "digits",
    file: Annotated[Path, typer.Option("--file", help="Where to write it.")] = Path("masert.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented config for a model and a data set."""
    with _guarded("init"):
        from maseRT.console import print_line
        from maseRT.scaffold import write_config

        write_config(file, model=model, data=data, overwrite=force)
        print_line(f"wrote {file}; run it with: masert transform --config {file}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, and which runtimes can build and run here."""
    with _guarded("doctor"):
        from maseRT.console import print_json, print_line, print_table
        from maseRT.doctor import examine

        findings = examine()
        if as_json:
            print_json("doctor", findings.as_dict())
            return
        for title, rows in findings.tables():
            print_line(title)
            print_table(rows)
            print_line("")


@app.command("run")
def run_command(
    engine: Annotated[Path, typer.Option("--engine", help="A TensorRT engine; its sidecar lies beside it.")],
    source: Annotated[Path, typer.Option("--input", help="An .npz file with an array per input.")],
    target: Annotated[Path, typer.Option("--output", help="The .npz file to write, with an array per output.")],
    device: Annotated[str, typer.Option("--device", help="cuda:N.")] = "cuda:0",
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Samples per inference; default: all.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Load an engine without a matching sidecar. An engine is code.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run an engine on arrays; needs the engine's library, cuda-python and numpy, but not torch."""
    with _guarded("run"):
        from maseRT.console import print_json, print_line
        from maseRT.runtimes.npz import run_file

        outputs = run_file(engine, source, target, device=device, batch=batch, trust=trust)
        shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in outputs.items()}
        if as_json:
            print_json("run", {"output": str(target), "outputs": shapes})
        else:
            told = ", ".join(f"{name} {each['shape']} {each['dtype']}" for name, each in shapes.items())
            print_line(f"wrote {target}: {told}")


@app.command("config")
def config_command(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check this file and print it resolved.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a config, for editors.")] = False,
    set_: SetOption = None,
) -> None:
    """Check a config, or print the schema of all configs."""
    with _guarded("config"):
        import json

        from maseRT.config import Config, load_config
        from maseRT.console import print_line
        from maseRT.errors import UsageError

        if schema:
            print_line(json.dumps(Config.model_json_schema(by_alias=True), indent=2))
        elif config is not None:
            resolved = load_config(config, set_ or [])
            print_line(json.dumps(resolved.model_dump(mode="json", by_alias=True, exclude_none=True), indent=2))
        else:
            raise UsageError("nothing to do", where="masert config", fix="give --config FILE or --schema")


def main() -> NoReturn:
    """Run the command line."""
    app()
    sys.exit(ExitCode.DONE)


def _show(outcome: Outcome, options: Options) -> None:
    if options.as_json or options.quiet:
        return
    from maseRT.console import print_line, print_table

    timing = f"{outcome.seconds:7.1f} s" if outcome.status == "done" else f"{outcome.status:>9}"
    print_line(f"{outcome.step:<13}{timing}  {outcome.headline or outcome.why or 'nothing changed'}")
    if outcome.table:
        print_table(outcome.table)
    for remark in outcome.remarks:
        print_line(remark)


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "step": outcome.step,
        "status": outcome.status,
        "why": outcome.why,
        "seconds": round(outcome.seconds, 3),
        "summary": outcome.summary,
        "outputs": [str(path) for path in outcome.outputs],
    }


def _require_all_rows(outcomes: list[Outcome]) -> None:
    """Raise what --strict asks for: no runtime may be left out."""
    from maseRT.errors import MissingError

    missing = [row for outcome in outcomes for row in outcome.summary.get("not_run", [])]
    if missing:
        raise MissingError(
            "\n".join(missing), where="--strict", fix="install what is missing, or leave it out of [analyze] runtimes"
        )


@contextmanager
def _guarded(command: str, options: Options | None = None) -> Iterator[None]:
    """Turn every way a command can end into its documented exit code, without a traceback."""
    from maseRT.console import print_error, print_json, set_up_logging

    signal.signal(signal.SIGTERM, _terminated)
    set_up_logging(verbose=bool(options and options.verbose), quiet=bool(options and options.quiet))
    try:
        yield
    except MaseRTError as error:
        if options and options.as_json:
            described = {"what": error.what, "where": error.where, "fix": error.fix}
            print_json(command, {"error": described, "exit_code": int(error.exit_code)})
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; what was done is kept", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except Exception as error:
        path = _write_crash(command)
        typer.echo(f"internal error, a bug in maseRT: {type(error).__name__}: {error}\ndetails: {path}", err=True)
        raise typer.Exit(ExitCode.BUG) from None


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(ExitCode.TERMINATED)


def _write_crash(command: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f"masert-{command}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"masert {__version__} {sys.argv[1:]}\n{traceback.format_exc()}")
    logging.getLogger("maseRT").debug("crash log in %s", name)
    return Path(name)


if __name__ == "__main__":
    main()
