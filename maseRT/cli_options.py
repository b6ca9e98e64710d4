"""Options that several commands share, and the run they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate

import typer

from maseRT.cli_group import Reply
from maseRT.workspace import DEFAULT_OUTPUT, Workspace

if TYPE_CHECKING:
    from maseRT.steps.pipeline import Run

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run's TOML file.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where the output tree grows.")]
RunOption = Annotated[str | None, typer.Option("--run", help="The run's name; default: the config's.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, instead of the config's.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
JunitOption = Annotated[
    Path | None, typer.Option("--junit", help="Write rows, gates and findings there, as test cases of JUnit.")
]

_LOAD = typer.Option("--load", help=r"Trained weights, instead of \[model] checkpoint.")
_LOAD_TYPE = typer.Option("--load-type", help="pl, pt, safetensors or pytorch-quantization; told from the file.")
_FORCE = typer.Option("--force", help="Run what is already done, too.")
_STRICT = typer.Option(
    "--strict", help="A runtime that cannot run here ends with exit code 3, a finding of the audit with 5."
)
_QUIET = typer.Option("--quiet", "-q", help="Errors only.")
_VERBOSE = typer.Option("--verbose", "-v", help="Say everything, on stderr.")


@dataclass(frozen=True)
class Options:
    """What every command that runs steps takes, in the order of its help; see `on_a_run`."""

    config: ConfigOption
    output: OutputOption = DEFAULT_OUTPUT
    run: RunOption = None
    overrides: SetOption = None
    load: Annotated[Path | None, _LOAD] = None
    load_type: Annotated[str | None, _LOAD_TYPE] = None
    force: Annotated[bool, _FORCE] = False
    strict: Annotated[bool, _STRICT] = False
    as_json: JsonOption = False
    quiet: Annotated[bool, _QUIET] = False
    verbose: Annotated[bool, _VERBOSE] = False

    @property
    def silent(self) -> bool:
        """Whether no text for a person is printed."""
        return self.as_json or self.quiet

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Read the config and yield its run; progress is shown inside the block only."""
        from maseRT.config_file import load_config
        from maseRT.console import reporting, set_up_logging
        from maseRT.steps.pipeline import Run

        set_up_logging(verbose=self.verbose, quiet=self.quiet)
        overrides = [*(self.overrides or ())]
        if self.load is not None:
            overrides.append(f"model.checkpoint={str(self.load)!r}")
        if self.load_type is not None:
            overrides.append(f"model.kind={self.load_type}")
        config = load_config(self.config, overrides)
        workspace = Workspace(self.output, self.run or self.config.stem)
        with reporting(quiet=self.quiet) as reporter:
            yield Run(config, self.config, workspace, reporter, self.force)


def on_a_run(command: Callable[Concatenate[Options, ...], Reply]) -> Callable[..., Reply]:
    """Give a command all of `Options` on the command line, before its own; it gets them as its first argument.

    Typer reads options off a signature, so the result has the one that both make together.
    """
    shared = signature(Options, eval_str=True).parameters
    own = list(signature(command, eval_str=True).parameters.values())[1:]

    @wraps(command)
    def parsed(**values: Any) -> Reply:
        return command(Options(**{name: values.pop(name) for name in shared}), **values)

    every = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*shared.values(), *own)]
    parsed.__signature__ = Signature(every)  # type: ignore[attr-defined]
    return parsed
