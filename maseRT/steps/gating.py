"""Judges a finished report by the gates of a config that has changed since: nothing has to be measured again."""

from __future__ import annotations

from dataclasses import replace

from maseRT.config import Config
from maseRT.records import FileState, StepRecord
from maseRT.workspace import Workspace, read_json


def judged_again(config: Config, workspace: Workspace, record: StepRecord) -> StepRecord:
    """Return the record of analyze with the gates as the config has them now, the report rewritten where they differ.

    The new record is saved.
    """
    wanted = config.gate.model_dump(mode="json", exclude_none=True) if config.gate else None
    if read_json(workspace.report, made_by="analyze")["config"].get("gate") == wanted:
        return record
    from maseRT.report.files import load_report  # what draws a report takes its time to import
    from maseRT.report.judging import judged, judgement
    from maseRT.report.publish import publish

    report = load_report(workspace.report)
    resolved = {name: value for name, value in report.config.items() if name != "gate"}
    resolved |= {"gate": wanted} if wanted else {}
    report = judged(report.model_copy(update={"config": resolved}), config.gate)
    fresh = {workspace.name_of(path): FileState.of(path) for path in publish(report, workspace)}
    summary = record.summary | judgement(report)
    record = replace(record, outputs=record.outputs | fresh, summary=summary)
    record.write(workspace)
    return record
