"""The report as one HTML file that needs no network: tables from a template, figures drawn by inlined Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from maseRT.report.cards import cards
from maseRT.report.columns import columns, launch_bound_sentence
from maseRT.report.drift import falls
from maseRT.report.environment import (
    common_method,
    config_values,
    differing_method,
    machine_facts,
    samples_sentence,
)
from maseRT.report.figures.page import page_figures
from maseRT.report.schema import Report
from maseRT.report.tables import epoch_tables, page_tables
from maseRT.report.verdict import verdict
from maseRT.report.wording import capitalized, count, metric_name, moment

_ORDER = {"error": 0, "warning": 1}


def html(report: Report) -> str:
    """Return the report as one HTML file: it loads no link, font, image or script from elsewhere."""
    figures = page_figures(report)
    specs = {figure.key: figure.spec() for figure in chain.from_iterable(figures.values())}
    context = {
        "report": report,
        "verdict": report.verdict or verdict(report),
        "cards": cards(report),
        "findings": sorted(report.findings, key=lambda finding: _ORDER[finding.severity]),
        "gates": sorted(report.gates, key=lambda gate: gate.passed),
        "columns": [column for column in columns(report) if column.shown != "aside"],
        "launch_bound": capitalized(launch_bound_sentence(report)),
        "samples": samples_sentence(report),
        "figures": figures,
        "tables": page_tables(report),
        "epochs": epoch_tables(report),
        "falls": falls(report),
        "sections": [(section, _rendered(section.lines)) for section in report.sections],
        "machine": machine_facts(report),
        "method": common_method(report),
        "methods": differing_method(report),
        "config": config_values(report.config),
        "style": Markup(_asset("style.css")),
        "script": Markup(_asset("figures.js")),
        "plotly": Markup(_plotly()) if specs else "",
        "specs": specs,
    }
    return _environment().get_template("report.html").render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("maseRT.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["count"] = count
    environment.filters["metric_name"] = metric_name
    environment.filters["moment"] = moment
    return environment


@cache
def _asset(name: str) -> str:
    return (files("maseRT.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Return the source of plotly.js. It is inlined whole: the Python package ships no smaller bundle."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _rendered(lines: Sequence[str]) -> Markup:
    """Return Markdown as HTML. Raw HTML in it is escaped, images are left out, and wide tables scroll in a box."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    markdown.add_render_rule("table_open", _table_open)
    markdown.add_render_rule("table_close", _table_close)
    markdown.add_render_rule("th_open", _heading_open)
    return Markup(markdown.render("\n".join(lines)))


def _table_open(*_: Any) -> str:
    return '<div class="scroll" tabindex="0"><table class="rendered">\n'


def _table_close(*_: Any) -> str:
    return "</table></div>\n"


def _heading_open(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    style = tokens[index].attrGet("style")
    return f'<th scope="col"{f" style={style!r}" if style else ""}>'
