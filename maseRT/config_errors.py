"""pydantic's validation errors in the words of a config file."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from maseRT.errors import did_you_mean


def problems_from_validation(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line per mistake: the key as the file spells it, what is wrong, the nearest valid spelling."""
    details = error.errors()
    # A list with a wrong entry counts as too short, on top of that entry's own mistake.
    wrong = {detail["loc"][:-1] for detail in details}
    lines = []
    for detail in details:
        if detail["type"] == "too_short" and detail["loc"] in wrong:
            continue
        line = _line(detail, model)
        if line not in lines:
            lines.append(line)
    return lines


def _line(detail: ErrorDetails, model: type[BaseModel]) -> str:
    loc = detail["loc"]
    key = place_of(loc)
    match detail["type"]:
        case "extra_forbidden":
            hint = did_you_mean(str(loc[-1]), _keys_at(loc[:-1], model))
            return f"unknown section [{key}]{hint}" if len(loc) == 1 else f"{key}: unknown key{hint}"
        case "missing":
            return f"[{key}] is missing" if len(loc) == 1 else f"{key}: is missing"
        case "literal_error" | "enum":
            expected = str(detail["ctx"]["expected"])
            valid = re.findall(r"'([^']*)'", expected)
            return f"{key}: {detail['input']!r} is not valid{did_you_mean(str(detail['input']), valid)}"
        case "too_short":
            least = detail["ctx"]["min_length"]
            return f"{key}: needs at least {'one entry' if least == 1 else f'{least} entries'}"
        case "tuple_type":
            return f"{key}: should be a list, in [brackets], got {_shown(detail['input'])}"
        case "string_pattern_mismatch":
            return f"{key}: {detail['input']!r} is not valid: {_description(loc, model)}"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
        case _:
            return f"{key}: {detail['msg'].lower()}, got {detail['input']!r}"


def place_of(loc: tuple[int | str, ...]) -> str:
    """Return ("quantize", "rules", 1, "name") as `quantize.rules[1].name`, without pydantic's union branch names."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part[:1].isupper():  # the class name of a union's branch
            continue
        else:
            text += f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    """Return a value as TOML has it, as far as an error needs it: a table's keys say which one is meant."""
    if isinstance(value, dict):
        return "a table with " + ", ".join(value)
    return f'"{value}"' if isinstance(value, str) else str(value)


def _description(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Return what the schema says about the value at `loc`."""
    table = _table_at(loc[:-1], model)
    fields = {field.alias or name: field for name, field in table.model_fields.items()} if table else {}
    return (fields[str(loc[-1])].description if str(loc[-1]) in fields else None) or "see `masert config --schema`"


def _keys_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys that the table at `loc` may hold."""
    table = _table_at(loc, model)
    return [field.alias or name for name, field in table.model_fields.items()] if table else []


def _table_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the class of the table at `loc`; None where there is no such table."""
    forms = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        chosen = [form for form in forms if form.__name__ == part]  # the tag of a union's branch is its class
        fields = {field.alias or name: field.annotation for name, field in forms[0].model_fields.items()}
        inner = [leaf for leaf in _flatten(fields.get(part)) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        forms = chosen or inner
        if not forms:
            return None
    return forms[0]


def _flatten(annotation: Any) -> list[Any]:
    args = get_args(annotation)
    return [annotation] if not args else [leaf for arg in args for leaf in _flatten(arg)]
