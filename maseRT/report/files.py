"""Reading report.json back, with plain words for everything that is no report; and its published JSON schema."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from maseRT import __version__
from maseRT.config_errors import place_of, problems_from_validation
from maseRT.errors import StepError, UsageError, shortened
from maseRT.report.schema import SCHEMA, Report

log = logging.getLogger(__name__)

_IN_RUN = Path("json") / "report.json"
_AGAIN = "write it anew: masert analyze --config CONFIG --force"
_SHOWN = 5


def load_report(path: Path) -> Report:
    """Read a report from its file, or from a run's folder such as mase_output/tensorrt/quantization/NAME.

    Keys that this maseRT does not know are left out, with a warning: a newer one of the same schema version adds some.

    Raises:
        UsageError: there is no such file, or it is no report at all.
        StepError: it is damaged, of another schema version, lacks something, or holds values of wrong types.
    """
    file = _file(path)
    raw = _read(file)
    if not isinstance(raw, dict):
        raise UsageError(f"holds a JSON {_kind(raw)}, not a report", where=str(file), fix=_what_to_give())
    _check_version(raw, file)
    try:
        return Report.model_validate(raw, strict=True)
    except ValidationError as error:
        unknown = _leave_out_unknown(raw, error)
    report = _validated(raw, file)
    if unknown:
        log.warning(
            "%s: written by maseRT %s; this one, %s, leaves out what it does not know: %s",
            file, _short(report.masert, 24), __version__, _short(shortened(unknown)),
        )  # fmt: skip
    return report


def _validated(raw: dict[str, Any], file: Path) -> Report:
    try:
        return Report.model_validate(raw, strict=True)
    except ValidationError as error:
        problems = problems_from_validation(error, Report)
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = ["does not hold what a report holds", *(f"  {_short(line)}" for line in problems[:_SHOWN]), *more]
        raise StepError("\n".join(lines), where=str(file), fix=_AGAIN) from None


def schema_json() -> str:
    """Return the JSON schema of report.json, as docs/report.schema.json publishes it.

    As to `load_report`, keys that it does not name are no mistake: newer reports of the same version may have them.
    """
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_open(Report.model_json_schema()),
        "title": f"maseRT report, schema version {SCHEMA}",
    }
    return json.dumps(schema, indent=2) + "\n"


def _open(schema: Any) -> Any:
    """Return a schema without what forbids further keys."""
    if isinstance(schema, list):
        return [_open(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _open(each) for key, each in schema.items() if (key, each) != ("additionalProperties", False)}


def _leave_out_unknown(raw: dict[str, Any], error: ValidationError) -> list[str]:
    """Delete the keys that no part of a report has, and return their places, such as `rows[0].colour`."""
    places = [detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"]
    for *path, key in places:
        owner: Any = raw
        for part in path:
            owner = owner[part]
        del owner[key]
    return [".".join(filter(None, (place_of(tuple(path)), str(key)))) for *path, key in places]


def _file(path: Path) -> Path:
    """Return the report that a path stands for."""
    if path.is_dir():
        inside = path / _IN_RUN
        if not inside.is_file():
            raise UsageError(
                f"the folder has no {_IN_RUN}",
                where=str(path),
                fix=f"{_what_to_give()}; `masert analyze` writes it",
            )
        return inside
    if not path.exists():
        raise UsageError("no such file or folder", where=str(path), fix=_what_to_give())
    return path


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError("is not text, so no report.json", where=str(file), fix=_what_to_give()) from None
    except OSError as error:
        raise StepError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode()  # an escape may stand for half a character
        return found
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        if text.lstrip()[:1] not in ("{", "["):
            raise UsageError("is not JSON, so no report.json", where=str(file), fix=_what_to_give()) from None
        raise StepError(f"damaged: not JSON: {reason}", where=str(file), fix=_AGAIN) from None


def _refuse(constant: str) -> NoReturn:
    """Refuse what Python writes for numbers that JSON does not have."""
    raise ValueError(f"{constant} is no number that a report holds")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(_short(text, 24))


def _check_version(raw: dict[str, Any], file: Path) -> None:
    """Refuse reports of other schema versions by name, before their keys are looked at."""
    version = raw.get("schema_version", raw.get("schema"))
    if version == SCHEMA and "schema_version" in raw:
        return
    if version is None:
        raise UsageError("is JSON, but no report: it has no schema_version", where=str(file), fix=_what_to_give())
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA:
        raise StepError(
            f"was written by a newer maseRT: schema version {version}, this one reads {SCHEMA}",
            where=str(file),
            fix="pip install --upgrade maseRT",
        )
    raise StepError(
        f"was written by an older maseRT: schema version {_short(repr(version))}, this one reads {SCHEMA}",
        where=str(file),
        fix=_AGAIN,
    )


def _what_to_give() -> str:
    return "give a report.json, a run's name, or its folder such as mase_output/tensorrt/quantization/NAME"


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
