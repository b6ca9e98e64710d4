"""Commands that read only report.json; they need neither torch nor a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maseRT.cli_group import Reply
from maseRT.cli_options import JsonOption, JunitOption
from maseRT.errors import UsageError

if TYPE_CHECKING:
    from maseRT.report.schema import Report


def _run_or_report(text: str) -> Path:
    """Return the path of a report; a run's name stands for its folder in the default place."""
    from maseRT.workspace import DEFAULT_OUTPUT, Workspace

    path = Path(text)
    if path.exists() or len(path.parts) != 1:
        return path
    folder = Workspace(DEFAULT_OUTPUT, text).root
    return folder if folder.is_dir() else path


_REPORT = typer.Argument(
    help="A run's name or folder, or its report.json.", metavar="RUN|REPORT.json", parser=_run_or_report
)
OutputFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="The folder to write to; default: where analyze wrote them.")
]


def add_report_commands(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command()(report)
    app.command()(compare)
    app.command()(audit)


def report(
    path: Annotated[Path | None, _REPORT] = None,
    output: OutputFolder = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of report.json.")] = False,
    as_json: JsonOption = False,
) -> Reply:
    """Write report.md and report.html anew, from report.json."""
    from maseRT.console import print_line

    if schema:
        return _schema(as_json=as_json)
    if path is None:
        raise UsageError("nothing to do", where="masert report", fix="give a run's folder, a report.json, or --schema")
    from maseRT.report.files import load_report
    from maseRT.report.html import html
    from maseRT.report.markdown import markdown
    from maseRT.workspace import write_text

    found = load_report(path)
    folder = output or _folder(path)
    texts = {folder / "report.md": markdown(found), folder / "report.html": html(found)}
    for target, text in texts.items():
        write_text(target, text)
        if not as_json:
            print_line(f"wrote {target}")
    if not as_json:
        print_line(found.verdict)
    return Reply({"run": found.run, "verdict": found.verdict, "outputs": [str(target) for target in texts]})


def _schema(*, as_json: bool) -> Reply:
    import json

    from maseRT.console import print_line
    from maseRT.report.files import schema_json

    text = schema_json()
    if not as_json:
        print_line(text.rstrip("\n"))
    return Reply({"json_schema": json.loads(text)})


def _folder(path: Path) -> Path:
    """Return the folder for report.md and report.html, given a run's folder or a report.json."""
    if path.is_dir():
        return path
    return path.resolve().parent.parent if path.resolve().parent.name == "json" else path.parent


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Two or more; the first is the base.", metavar="RUN RUN...", parser=_run_or_report),
    ],
    allow: Annotated[
        bool, typer.Option("--allow-different-methods", help="Compare even what was measured in different ways.")
    ] = False,
    as_json: JsonOption = False,
) -> Reply:
    """Put runs side by side, and say what is significant and what is noise."""
    from maseRT.console import print_line, print_table
    from maseRT.report.compare import compare as compared
    from maseRT.report.files import load_report

    if len(runs) < 2:
        fix = "give two or more run folders, or report.json files"
        raise UsageError("one run cannot be compared", where="masert compare", fix=fix)
    found = compared(_named(runs, [load_report(path) for path in runs]), allow_different_methods=allow)
    if not as_json:
        print_table(found.table())
        for line in found.lines():
            print_line(line)
    return Reply(found.as_dict())


def _named(paths: Sequence[Path], reports: Sequence[Report]) -> dict[str, Report]:
    """Return the reports by run name; runs of one name with what sets their paths apart, or a number."""
    found: dict[str, Report] = {}
    for place, (path, report) in enumerate(zip(paths, reports, strict=True), 1):
        name = report.run
        alike = [other for other, its in zip(paths, reports, strict=True) if its.run == name]
        if len(alike) > 1:
            name = f"{name} ({_part(path, alike) or place})"
        found[name if name not in found else f"{name} ({place})"] = report
    return found


def _part(path: Path, alike: Sequence[Path]) -> str:
    """Return a path without what all have in common at both ends; "" if nothing is left."""
    paths, parts = [other.resolve().parts for other in alike], path.resolve().parts
    start = _common(paths)
    end = _common([other[start:][::-1] for other in paths])
    return "/".join(parts[start : len(parts) - end])


def _common(paths: Sequence[Sequence[str]]) -> int:
    """Return how many of their first parts are the same."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def audit(
    path: Annotated[Path, _REPORT],
    strict: Annotated[bool, typer.Option("--strict", help="Warnings end with exit code 5, too.")] = False,
    junit: JunitOption = None,
    as_json: JsonOption = False,
) -> Reply:
    """Check a report against itself; errors, figures that contradict each other, end with exit code 5."""
    from maseRT.cli_outcomes import audit_error, finding_line
    from maseRT.console import print_line
    from maseRT.report.audit import audit as audited
    from maseRT.report.files import load_report
    from maseRT.report.junit import junit_xml
    from maseRT.report.wording import count
    from maseRT.workspace import write_text

    found = load_report(path)
    findings = audited(found)
    plain = [finding.model_dump() for finding in findings]
    if junit is not None:
        write_text(junit, junit_xml(found.model_copy(update={"findings": findings}), warnings_fail=strict))
    if not as_json:
        for finding in plain:
            print_line(finding_line(finding))
        if not plain:
            print_line(f"{found.run}: nothing contradicts itself, in {count(len(found.rows), 'row')}")
    wrong = [finding for finding in plain if strict or finding["severity"] == "error"]
    return Reply({"run": found.run, "findings": plain}, audit_error(wrong, where=str(path)))
