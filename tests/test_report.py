"""The HTML page: what it says, that it is self-contained, and that a real browser draws it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evidence import KEPT, Evidence, make_evidence

from edgeprune.core.budget import format_seconds
from edgeprune.core.errors import UsageError
from edgeprune.core.family import list_members
from edgeprune.core.records import Accuracy, Cost, Importance, Quantity, Samples
from edgeprune.core.stats import over_inputs
from edgeprune.figures import Run
from edgeprune.figures.kernels import kernel_times
from edgeprune.report import draw_figures, headline, render_report, write_report

FIGURES = ["samples", "accuracy", "widths", "kernels", "predictions", "curves"]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return make_evidence()


def render(evidence: Evidence) -> str:
    return render_report(
        report=evidence.report, plan=evidence.plan, graph=evidence.graph, profile=evidence.profile,
        importance=evidence.importance,
    )  # fmt: skip


def figures_of(evidence: Evidence) -> dict[str, object]:
    run = Run(
        report=evidence.report, plan=evidence.plan, graph=evidence.graph, profile=evidence.profile,
        importance=evidence.importance,
    )  # fmt: skip
    return {figure.name: figure for figure in draw_figures(run)}


class Page(HTMLParser):
    """Text of the page outside scripts, its tags, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.loads, self.open, self.rows, self.ids = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.loads += [named[key] for key in ("src", "href", "srcset", "data") if key in named]
        if "id" in named:
            self.ids.append(named["id"])
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)
            if self.open and self.open[-1] in ("td", "th") and self.rows:
                self.rows[-1].append(data)


@pytest.fixture(scope="module")
def page(evidence: Evidence) -> Page:
    return Page(render(evidence))


def test_headline(evidence: Evidence) -> None:
    dense, compact = evidence.report.dense.latency_s, evidence.report.compact.latency_s
    assert dense is not None and compact is not None
    assert headline(evidence.report) == (
        f"2.0× faster on raspberry-pi-4: {format_seconds(dense.median)} → {format_seconds(compact.median)} measured, "
        "accuracy 97.2% → 96.9%"
    )
    slower = replace(evidence.report, compact=Cost(latency_s=Quantity(median=2 * dense.median, low=0.0, high=1.0)))
    assert headline(slower).startswith("2.0× slower")
    unknown = replace(evidence.report, compact=Cost(), accuracy=Accuracy())
    assert headline(unknown) == "Pruned for raspberry-pi-4"


def test_page_is_whole_and_loads_nothing(page: Page) -> None:
    assert page.open == []
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert [f"plot-{name}" in page.ids for name in FIGURES] == [True] * len(FIGURES)


def test_page_shows_what_was_measured(page: Page, evidence: Evidence) -> None:
    text = " ".join(page.text)
    assert "All 4 checks passed" in text
    for group in evidence.graph.prunable:
        assert [group.name, str(KEPT[group.name]), str(group.units)] in [row[:3] for row in page.rows]
    for result in evidence.plan.alternatives:
        assert [result.solver, result.status, f"{result.loss:.4g}"] in [row[:3] for row in page.rows]
    assert ["logits", "10", "output of the model"] in page.rows
    assert "cumsum (position_encoding)" in text
    assert evidence.report.artifact_sha256 in page.text
    assert "Cortex-A72" in page.text


def test_groups_that_went_by_magnitude_are_named(evidence: Evidence) -> None:
    group = next(group for group in evidence.graph.prunable if group.inexact_because is None)
    by_magnitude = replace(evidence.importance, by_magnitude=(group.name, "logits"))
    rows = Page(render(replace(evidence, importance=by_magnitude))).rows
    assert [group.name, str(group.units), "pruned, but by magnitude, since the criterion cannot score it"] in rows
    assert ["logits", "10", "output of the model"] in rows, "what is frozen goes by nothing"


def test_failed_check_is_named() -> None:
    failed = Page(render(make_evidence(passed=False)))
    assert "1 of 4 checks failed" in " ".join(failed.text)
    assert ["FAILED", "latency (median)"] in [row[:2] for row in failed.rows]


def test_every_figure_has_its_numbers_as_a_table(evidence: Evidence) -> None:
    assert list(figures_of(evidence)) == FIGURES
    samples = evidence.report.samples
    spread = over_inputs(samples["compact"], samples["dense"], {"layer1.gate": [True, False, False, False] * 100})
    by_input = replace(evidence, report=replace(evidence.report, distribution=spread))
    figures = figures_of(by_input)
    assert sorted(figures) == list_members("figures")
    assert "layer1.gate ran for 2" in figures["inputs"].says
    rows = Page(render(by_input)).rows
    assert ["latency, worst input", f"{spread.worst_share:.1%}"] in [[row[0], row[-1]] for row in rows if row]
    assert any(row and row[0] == "latency, mean over inputs" for row in rows)
    for figure in figures.values():
        assert len(figure.table.rows) > 1
        assert {len(row) for row in figure.table.rows} == {len(figure.table.header)}
        assert figure.layout["height"] > 100


def test_kernels_are_measured_where_they_can_be(evidence: Evidence) -> None:
    dense, measured = kernel_times(evidence.graph, evidence.profile, {})
    assert measured
    full, _ = kernel_times(evidence.graph, evidence.profile, evidence.graph.units)
    assert full == dense
    tables, from_tables = kernel_times(evidence.graph, evidence.profile, {"layer3": 33})
    assert not from_tables
    assert tables["layer3_1_conv1_nchwc"] < dense["layer3_1_conv1_nchwc"]
    figure = figures_of(replace(evidence, profile=replace(evidence.profile, measurements=())))["kernels"]
    assert [trace["name"] for trace in figure.traces] == ["dense (from the tables)", "pruned (from the tables)"]


def test_many_kernels_are_gathered(evidence: Evidence) -> None:
    many = tuple(
        replace(kernel, name=f"{kernel.name}_{copy}") for kernel in evidence.profile.kernels for copy in range(4)
    )
    figure = figures_of(replace(evidence, profile=replace(evidence.profile, kernels=many, measurements=())))["kernels"]
    names = figure.traces[0]["y"]
    assert len(names) == len(set(names)) == 41
    assert names[-1] == f"{len(many) - 40} others"
    whole, _ = kernel_times(evidence.graph, replace(evidence.profile, kernels=many, measurements=()), {})
    assert sum(figure.traces[0]["x"]) == pytest.approx(1e6 * sum(whole.values()))


def test_predictions_hold_every_configuration(evidence: Evidence) -> None:
    figure = figures_of(evidence)["predictions"]
    kinds = [row[0] for row in figure.table.rows]
    assert [kinds.count(kind) for kind in ("fitted", "held out", "closed loop")] == [19, 6, 3]
    worst = max(abs(float(row[4].rstrip("%"))) for row in figure.table.rows if row[0] == "held out")
    assert worst < 5


def test_what_was_not_measured_is_left_out(evidence: Evidence) -> None:
    bare = replace(
        evidence,
        report=replace(evidence.report, samples={}, accuracy=Accuracy(), compact=Cost(), dense=Cost()),
        profile=replace(evidence.profile, measurements=(), held_out=None, kernels=()),
        importance=Importance(criterion="magnitude", graph_sha256="a", scores={}),
        plan=replace(evidence.plan, rounds=(), alternatives=()),
    )
    assert list(figures_of(bare)) == ["widths"]
    text = " ".join(Page(render(bare)).text)
    assert "The closed loop" not in text
    assert "None" not in text


def test_names_from_outside_are_text_not_markup(evidence: Evidence) -> None:
    evil = "</script><script>alert(1)</script><b>"
    graph = replace(evidence.graph, groups=tuple(replace(g, name=g.name + evil) for g in evidence.graph.groups))
    report = replace(evidence.report, target=evil, provenance={evil: evil})
    html = render(
        replace(evidence, graph=graph, report=report, profile=replace(evidence.profile, kernels=(), measurements=()))
    )
    assert evil not in html
    assert "<script>alert" not in html
    assert evil in Page(html).text


def test_write_is_whole_or_not_at_all(evidence: Evidence, tmp_path: Path) -> None:
    records = {name: getattr(evidence, name) for name in ("report", "plan", "graph", "profile", "importance")}
    write_report(tmp_path / "deep" / "report.html", **records)
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == render(evidence)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", **records)


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_every_plot(evidence: Evidence, tmp_path: Path, width: int) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    path = tmp_path / "report.html"
    path.write_text(render(evidence), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000",
         "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"CONSOLE.*", done.stderr), done.stderr
    plots = re.findall(r'<div class="plot js-plotly-plot" id="plot-(\w+)"', done.stdout)
    assert plots == FIGURES
    assert done.stdout.count('class="main-svg"') >= len(FIGURES)
    points = len(re.findall(r'<path class="point', done.stdout)) + done.stdout.count('<g class="point"')
    assert points > 2 * len(evidence.graph.prunable)


def test_one_sample_a_round_is_enough(evidence: Evidence) -> None:
    samples = {name: (Samples(values=(1e-3,)), Samples(values=(1.1e-3,))) for name in ("dense", "compact")}
    figure = figures_of(replace(evidence, report=replace(evidence.report, samples=samples)))["samples"]
    assert np.isclose(figure.traces[0]["y"], [1.0, 1.1]).all()


def test_one_interrupted_sample_does_not_flatten_the_others(evidence: Evidence) -> None:
    usual = tuple(1e-3 + 1e-6 * number for number in range(99))
    samples = {name: (Samples(values=(*usual, 1.0)),) for name in ("dense", "compact")}
    figure = figures_of(replace(evidence, report=replace(evidence.report, samples=samples)))["samples"]
    for panel in ("yaxis", "yaxis2"):
        low, high = figure.layout[panel]["range"]
        assert low < 1.0 < 1.098 < high < 1.2
    assert figure.table.rows[0][-1] == "1000"
