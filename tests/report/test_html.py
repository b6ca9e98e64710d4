"""report.html: one file, the report's figures, nothing from elsewhere, hostile names as text."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import reports
from reports import make

from maseRT.report.html import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a page says and how it is built."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.raw = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.raw = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.raw = ""

    def handle_data(self, data):
        if not self.raw:
            self.words.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(word for word in self.words if word)

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page():
    return Page(html(make(reports.vgg7())))


def test_figures_of_the_report_stand_in_the_page(page):
    for figure in ("5.50x", "5.47–5.53", "93.02", "−0.16 to −0.04", "175,920", "0.360", "0.359–0.362", "2.25 mJ"):
        assert figure in page.text
    for value in ("percentile", "learning_rate", "accuracy_drop", "0.95"):  # the config
        assert value in page.text
    report = make(reports.vgg7())
    exact = {attributes.get("title") for attributes in page.of("td")}
    for row in report.ran():
        assert repr(row.metrics.values["accuracy"]) in exact
        if row.timings:
            assert f"{row.timings[0].end_to_end.p50_ms!r} ms" in exact


def test_a_device_that_waits_for_the_host_is_called_launch_bound():
    raw = reports.vgg7()
    raw["rows"][0]["timings"][0]["device"]["waited"] = 1.0
    text = Page(html(make(raw))).text
    assert "≤1.72" in text
    assert f"Launch-bound at batch 64: {raw['rows'][0]['name']}; the device waits for the host" in text
    assert "on the device, device events, launch-bound" in text


def test_what_fails_comes_before_the_results(page):
    text = page.text
    assert text.index("1 of 2 gates failed") < text.index("Every row saw")
    assert text.index("The self-audit found 1 error") < text.index("The self-audit found 1 warning")
    assert "did not run: the engine was built by tensorrt" in text


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("#", "data:")), (tag, value)
    style = next(iter(re.findall(r"<style>(.*?)</style>", html(make(reports.bare())), re.S)))
    assert "url(" not in style
    assert "@import" not in style


def test_it_can_be_heard(page):
    assert [each.get("lang") for each in page.of("html")] == ["en"]
    assert len(page.of("h1")) == 1
    assert all("scope" in each for each in page.of("th"))
    plots = [each for each in page.of("div") if each.get("class") == "plot"]
    assert plots
    assert all(each["role"] == "img" and len(each["aria-label"]) > 20 for each in plots)
    named = {each["for"] for each in page.of("label")}
    assert all(each["id"] in named for each in page.of("select"))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert all(each["href"][1:] in ids for each in page.of("a"))


def test_levels_of_headings_are_not_skipped(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_hostile_names_stay_text():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    raw = reports.digits()
    raw["precision"]["layers"][0]["name"] = evil
    raw["calibration"]["histograms"][0]["tensor"] = evil
    raw["rows"][1]["name"] = evil
    raw["rows"][-1]["not_run"] = evil
    raw["notes"] = [evil]
    raw["config"] = {"model": {evil: evil}}
    raw["sections"] = [{"key": "k", "title": evil, "values": {}, "lines": [evil, "", "![x](http://e/x.png)"]}]
    raw["run"] = evil
    found = Page(html(make(raw)))
    assert len(found.of("script")) == 3
    assert not found.of("img")
    assert evil in found.text


def test_figures_in_the_page_are_json(page):
    text = html(make(reports.vgg7()))
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S).group(1))
    assert set(figures) == {each["id"] for each in page.of("div") if each.get("class") == "plot"}


def test_sections_without_data_are_left_out():
    found = Page(html(make(reports.bare())))
    assert not {"precision", "drift", "calibration", "learning", "config"} & set(found.ids())
    assert "results" in found.ids()


def test_a_report_without_figures_carries_no_plotly():
    raw = reports.bare()
    raw["rows"][0]["metrics"]["confusion"] = None
    raw["rows"][0]["timings"] = []
    assert len(html(make(raw))) < 100_000


@pytest.mark.parametrize("make_raw", [reports.regression, reports.nothing_ran])
def test_unusual_runs_have_a_page(make_raw):
    report = make(make_raw())
    found = Page(html(report))
    for row in report.rows:
        assert row.name in found.text
        assert row.not_run in found.text


def test_values_that_are_no_numbers_are_called_so():
    raw = reports.digits()
    raw["rows"][1]["metrics"]["loss"] = float("nan")
    raw["rows"][1]["metrics"]["values"]["f1"] = float("nan")
    raw["rows"][1]["difference"] = reports.change(float("nan"), float("nan"))
    assert "not a number" in Page(html(make(raw))).text


def test_sections_of_other_steps_stand_in_the_page(page):
    assert "Sensitivity" in page.text
    assert '{ name = "feature_layers.0", precision = "fp16" },' in page.text


def test_a_model_of_300_layers_stays_small():
    assert len(html(make(reports.huge(300)))) < 8_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_it_without_errors_and_without_a_network(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html(make(reports.vgg7())), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--disable-background-networking", "--virtual-time-budget=4000", "--enable-logging=stderr", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert 'data-drawn="true"' in done.stdout, done.stderr[-2000:]
    assert done.stdout.count('class="main-svg"') >= 10
    assert "CONSOLE" not in done.stderr
    assert "Refused" not in done.stderr
