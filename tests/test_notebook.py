"""What a notebook shows: pictures without a backend of matplotlib's, and tables of whatever text."""

from __future__ import annotations

import base64
import re
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlr
from fastlr._progress import progress

LRS = np.geomspace(1e-4, 10, 200)
FOUND = fastlr.RangeTestResult(LRS, 2 + np.log10(LRS / 0.1) ** 2 / 4, notes=["<b>&amp;"])
NOTHING = fastlr.RangeTestResult([], [])
PLAN = fastlr.BatchPlan.from_schedule(
    fastlr.MultiStep(0.1, [60, 120, 160], 0.2, unit="epoch"),
    batch_size=128,
    dataset_size=50_000,
    epochs=200,
    momentum=0.9,
    max_batch_size=5120,
)


class Tables(HTMLParser):
    """The cells of the tables of a page, and its text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.outside, self.open = "", [""]
        self.feed(text)
        assert self.open == [""]  # all that is opened is closed

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text
        else:
            self.outside += text + "\n"


def shown(value: object) -> Tables:
    text = value._repr_html_()  # type: ignore[attr-defined]
    assert len(text) < 6000
    assert not re.search(r"color|background|style|script", text)  # the notebook's own, light or dark
    return Tables(text)


def test_a_range_test_shows_its_summary():
    page = shown(FOUND)
    title, *lines = FOUND.summary().splitlines()
    assert page.outside.splitlines() == [title, "note: <b>&amp;"]
    assert [row[0].ljust(8) + "  " + row[1] for row in page.rows] == lines[:-1]
    page = shown(NOTHING)
    assert page.rows == []
    assert page.outside.splitlines() == NOTHING.summary().splitlines()


def test_a_grid_shows_its_table():
    grid = fastlr.RangeTestGrid(({"momentum": 0.8}, {"momentum": 0.9}), (FOUND, FOUND))
    assert shown(grid).rows == grid.table()


def test_a_plan_shows_the_table_that_it_prints():
    page = shown(PLAN)
    title, _, heading, _, *phases, _, totals, note = str(PLAN).splitlines()
    cells = [[cell for cell in row if cell] for row in page.rows]
    assert [" ".join(row) for row in cells] == [" ".join(s.split()) for s in (heading, *phases, totals)]
    assert page.outside.splitlines() == [title, note]


def test_a_smooth_plan_is_short():
    plan = fastlr.BatchPlan.from_schedule(
        fastlr.Cosine(0.1, 0.001, 200, unit="epoch"), batch_size=16, dataset_size=50_000, epochs=200
    )
    assert len(shown(plan).rows) == 1 + 33 + 1
    assert "are not shown" in str(plan)


SCHEDULES = [
    (fastlr.Cosine(0.1, 0.0, 4), [("at update 0", "0.1"), ("at update 2", "0.05"), ("at update 4", "0")]),
    (fastlr.Constant(0.3), [("at update 0", "0.3"), ("at most", "0.3")]),
    (fastlr.StepDecay(0.1, 30, 0.5, unit="epoch").in_samples(1000), [("at sample 0", "0.1")]),
    (fastlr.LinearRamp(0.0, 0.1, 8).then(fastlr.Cosine(0.1, 0.0, 92)), [("at update 100", "0")]),
    (fastlr.Tabulated(np.linspace(1, 0, 5000)), [("at update 0", "1"), ("at update 4,999", "0")]),
    (fastlr.OneCycleMomentum(0.85, 0.95, 60), [("at update 0", "0.95")]),
]


@pytest.mark.parametrize(("schedule", "values"), SCHEDULES, ids=lambda value: type(value).__name__)
def test_a_schedule_shows_its_arguments_and_some_values(schedule, values):
    page = shown(schedule)
    assert page.outside.strip() == f"{type(schedule).__name__}: {schedule.quantity}"
    rows = dict(page.rows)
    assert values == [(name, rows[name]) for name, _ in values]
    assert rows["unit"] == repr(schedule.unit)
    for name, text in rows.items():
        if hasattr(schedule, name):
            whole = repr(getattr(schedule, name))
            assert text == (whole if len(whole) <= 100 else whole[:97] + "...")


def test_a_figure_shows_its_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for plot in (FOUND.plot, partial(fastlr.Cosine(0.1, 0.0, 100).plot, None), PLAN.plot):
        plot(tmp_path / "saved.png")
        data, size = plot()._repr_png_()
        assert data == (tmp_path / "saved.png").read_bytes()
        assert 600 < size["width"] < 1100
        assert size["width"] > size["height"] > 300


def test_without_ipywidgets_a_notebook_gets_sentences(monkeypatch, capsys):
    """And no warning of rich's in the place of a bar."""
    console = pytest.importorskip("rich.console", reason="bars are rich's")
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    model = torch.nn.Linear(2, 2)
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))] * 4
    optimizer = fastlr.FusedSGD(model.parameters())
    fastlr.range_test(model, optimizer, torch.nn.functional.cross_entropy, batches, num_steps=4)
    assert "range test: backup of" in capsys.readouterr().err
    with progress(True) as stage:
        stage("a stage", 1)()
    assert capsys.readouterr().err.startswith("a stage: ")


CELLS = {
    "figure": ("fastlr.Cosine(0.1, 0.0, 100).plot()", "image/png"),
    "inline backend": ("%matplotlib inline\nfastlr.Cosine(0.1, 0.0, 100).plot()", "image/png"),
    "schedule": ("fastlr.Cosine(0.1, 0.0, 100)", "text/html"),
    "result": ("fastlr.RangeTestResult([0.1, 0.2], [2.0, 1.0])", "text/html"),
    "plan": ("fastlr.BatchPlan.from_phases([(0, 4)], dataset_size=10, epochs=2, lr=0.1)", "text/html"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_notebooks_show_pictures_and_tables(tmp_path: Path):
    """In a kernel."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    nbclient = pytest.importorskip("nbclient", reason="runs notebooks")
    pytest.importorskip("ipykernel", reason="runs notebooks")
    nbformat = pytest.importorskip("nbformat", reason="writes notebooks")
    cells = [
        nbformat.v4.new_code_cell(source) for source in ("import fastlr", *(s for s, _ in CELLS.values()))
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    # Elsewhere than here, as a kernel imports from its folder first.
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    for cell, (_, kind) in zip(cells[1:], CELLS.values(), strict=True):
        (output,) = cell.outputs
        assert kind in output.data
        if kind == "image/png":
            assert base64.b64decode(output.data[kind]).startswith(b"\x89PNG")
