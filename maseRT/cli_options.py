"""Options that several commands share, and the run they describe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from maseRT.steps.pipeline import Run

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
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict", help="A runtime that cannot run here ends with exit code 3, a finding of the audit with 5."
    ),
]
JunitOption = Annotated[
    Path | None, typer.Option("--junit", help="Write gates and findings there, as test cases of JUnit.")
]


@dataclass(frozen=True)
class Options:
    """The values of the options that all commands on a run share."""

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
        from maseRT.workspace import Workspace

        set_up_logging(verbose=self.verbose, quiet=self.quiet)
        overrides = list(self.overrides)
        if self.load is not None:
            overrides.append(f"model.checkpoint={str(self.load)!r}")
        if self.load_type is not None:
            overrides.append(f"model.kind={self.load_type}")
        config = load_config(self.config, overrides)
        workspace = Workspace(self.output, self.run or self.config.stem)
        with reporting(quiet=self.quiet) as reporter:
            yield Run(config, self.config, workspace, reporter, self.force)
