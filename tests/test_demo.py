"""The demo on a tiny setting: every file is there, complete, and says what the runs say."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from statistics import mean, median

import numpy as np
import pytest
import torch

import fastlr
from fastlr import demo

for package in ("jinja2", "matplotlib", "rich", "scipy", "sklearn"):
    pytest.importorskip(package, reason=f"the demo needs {package}")

SEEDS, UPDATES = 2, 60


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return demo.run(
        "digits", out=tmp_path_factory.mktemp("demo") / "report", seeds=SEEDS, updates=UPDATES, progress=False
    )


class Page(HTMLParser):
    """The tables, pictures, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.alts = []
        self.rows, self.pictures, self.narrow, self.references, self.open = [], [], [], [], []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.alts += [value for name, value in attrs if name == "alt"]
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset"):
                lists = {"img": self.pictures, "source": self.narrow}
                lists.get(tag, self.references).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text


def test_every_file_is_written(report):
    assert [path.name for path in report.files] == [
        "range_test.png",
        "schedules.png",
        "accuracy.png",
        "index.html",
    ]
    for path in report.files:
        assert path.stat().st_size > 2000


def test_the_page_needs_no_other_file(report):
    text = report.files[-1].read_text(encoding="utf-8")
    page = Page(text)
    assert page.references == []
    assert "http" not in text.replace("data:image/png;base64", "")[: text.index("base64")]
    assert "url(" not in text
    assert "@import" not in text
    prefix = "data:image/png;base64,"
    assert all(picture.startswith(prefix) for picture in page.pictures + page.narrow)
    contents = [base64.b64decode(picture.removeprefix(prefix)) for picture in page.pictures]
    assert contents == [path.read_bytes() for path in report.files[:3]]
    assert len(set(page.narrow)) == 3
    for wide, narrow in zip(contents, page.narrow, strict=True):
        drawn = base64.b64decode(narrow.removeprefix(prefix))
        widths = [int.from_bytes(png[16:20], "big") for png in (drawn, wide)]
        assert 600 < widths[0] < 750 < 1000 < widths[1]


def test_the_page_holds_table_and_verdict(report):
    page = Page(report.files[-1].read_text(encoding="utf-8").replace("\u00a0", " "))
    rows = report.table()
    assert page.rows == rows
    for sentence in report.verdict():
        assert sentence in page.text
    for outcome in report.compared:
        (accuracy,) = (row[3] for row in rows if row[0] == outcome.name)
        assert f"{outcome.name}{accuracy}" in page.text


def test_the_pages_pictures_are_told_to_those_who_do_not_see_them(report):
    page = Page(report.files[-1].read_text(encoding="utf-8"))
    of_test, of_schedules, of_accuracy = page.alts
    assert f"from {report.found.base_lr:.2g} to {report.found.max_lr:.2g} it is shaded" in of_test
    for outcome in report.compared:
        assert outcome.name in of_schedules
        assert outcome.name in of_accuracy


def test_a_dark_page_is_printed_on_white(report):
    """Dark colours are the screen's alone."""
    text = report.files[-1].read_text(encoding="utf-8")
    assert re.findall(r"@media (.*prefers.*) \{", text) == ["screen and (prefers-color-scheme: dark)"]


def test_the_page_fits_a_phone_and_a_desk(report, tmp_path):
    """In a browser nothing is wider than the window, and the pictures are those for it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no Chromium to show the page")
    measure = """<script>onload = () => {
      const shown = [...document.images].map(image => image.currentSrc === image.src ? "wide" : "narrow");
      document.title = [document.documentElement.scrollWidth, ...shown].join(" ");
    }</script></body>"""
    text = report.files[-1].read_text(encoding="utf-8").replace("</body>", measure)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--window-size=1300,900",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    for width, kind in ((390, "narrow"), (1200, "wide")):
        # Chromium makes no window as narrow as a phone: a frame in it is.
        frame = f'<iframe src="page.html" style="border: 0; width: {width}px; height: 800px"></iframe>'
        show = "<script>onload = () => { document.title = frames[0].document.title }</script>"
        (tmp_path / "frame.html").write_text(f"<title></title><body>{frame}{show}</body>")
        address = str(tmp_path / "frame.html")
        done = subprocess.run([*command, address], capture_output=True, text=True, timeout=60)
        found = re.search("<title>([^<]*)", done.stdout)
        assert found, done.stderr
        assert found[1].split() == [str(width), *[kind] * 3]


def test_the_table_is_complete_and_says_what_the_runs_say(report):
    headings, *rows = report.table()
    assert len(rows) == len(report.outcomes)
    kinds = [outcome.name.split(" 0.")[0] for outcome in report.outcomes]
    assert kinds[0] == "triangular2"
    assert kinds.count("step decay") >= 3
    assert kinds.count("fixed") == 7
    fixed = [o for o in report.outcomes if o.name.startswith("fixed")]
    best = max(mean(run[-1] for run in o.accuracies) for o in fixed)
    assert report.target == pytest.approx(best)
    assert f"{100 * best:.1f} %" in headings[2]
    for row, outcome in zip(rows, report.outcomes, strict=True):
        accuracies = np.array(outcome.accuracies)
        assert accuracies.shape == (SEEDS, len(report.measured_at))
        assert ((accuracies >= 0) & (accuracies <= 1)).all()
        finals = 100 * accuracies[:, -1]
        assert row[3] == f"{finals.mean():.1f} \u00b1 {finals.std(ddof=1):.1f} %"
        assert float(row[4]) >= 0
        first = [
            report.measured_at[int(np.argmax(run >= best))] if (run >= best).any() else np.inf
            for run in accuracies
        ]
        if max(first) < np.inf:
            assert row[2] == f"{median(first):,.0f}"
        else:
            assert row[2] == ("not reached" if min(first) == np.inf else "only in 1 of 2 runs")


def test_bounds_are_those_of_the_range_test(report):
    found = report.found
    assert found
    assert f"{found.base_lr:.2g} to {found.max_lr:.2g}" in report.table()[1][1]
    assert report.measured_at[-1] == UPDATES


def test_a_seed_decides_everything(report, tmp_path):
    again = demo.run("digits", out=tmp_path, seeds=1, updates=UPDATES, progress=False)
    assert again.found.max_lr == report.found.max_lr
    assert again.outcomes[0].accuracies[0] == report.outcomes[0].accuracies[0]
    assert report.outcomes[0].accuracies[0] != report.outcomes[0].accuracies[1]
    assert "one run of each" in again.verdict()[0]


def test_the_caller_keeps_threads_and_random_numbers(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    demo.run("digits", out=tmp_path, seeds=1, updates=40, progress=False)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_terminal_each_stage_is_a_line(tmp_path, capsys):
    report = demo.run("digits", out=tmp_path, seeds=1, updates=40)
    lines = capsys.readouterr().err.splitlines()
    names = ["range test", *(outcome.name for outcome in report.outcomes)]
    assert [line.split(":")[0] for line in lines] == names


def made_up(*outcomes):
    """A report on outcomes of one's own: a cyclic one, then step decays and fixed rates."""
    points = len(outcomes[0].accuracies[0])
    return demo.Report(
        found=fastlr.RangeTestResult([], []),
        range_test_seconds=0.0,
        measured_at=tuple(range(10, 10 * points + 1, 10)),
        outcomes=outcomes,
        files=(),
    )


def test_updates_to_the_target_are_counted_to_where_it_is_first_reached():
    def outcome(name, *runs):
        return demo.Outcome(name, "", runs, 0.0)

    report = made_up(
        outcome("triangular2", (0.2, 0.8, 0.7), (0.8, 0.9, 0.9), (0.79, 0.79, 0.9)),
        outcome("step decay", (0.9, 0.7, 0.7), (0.9, 0.7, 0.7), (0.7, 0.7, 0.7)),
        outcome("fixed 1", (0.1, 0.1, 0.8), (0.1, 0.1, 0.7), (0.1, 0.1, 0.9)),
        outcome("fixed 2", (0.1, 0.1, 0.7), (0.1, 0.1, 0.7), (0.1, 0.1, 0.7)),
        outcome("fixed 3", (0.1, 0.1, 0.7), (0.1, 0.1, 0.7), (0.1, 0.85, 0.7)),
    )
    assert report.target == pytest.approx(0.8)
    assert [row[2] for row in report.table()] == [
        "updates to 80.0 %",
        "20",
        "10 (2 of 3 runs)",
        "30 (2 of 3 runs)",
        "not reached",
        "only in 1 of 3 runs",
    ]
    assert "triangular2: 20, fixed 1: 30, step decay: 10" in report.verdict()[2]


PAIRS = {
    "above": ([0.95, 0.96, 0.97], [0.90, 0.91, 0.93]),
    "below": ([0.90, 0.91, 0.93], [0.95, 0.96, 0.97]),
    "a tie": ([0.95, 0.90, 0.93], [0.94, 0.93, 0.91]),
    "a tie, mostly above": ([0.95, 0.97, 0.94, 0.96], [0.94, 0.95, 0.945, 0.945]),
    "a tie, equal": ([0.95, 0.90], [0.95, 0.90]),
    "above, many runs": ([0.95] * 10 + [0.96] * 10, [0.94] * 12 + [0.93] * 8),
}


@pytest.mark.parametrize(("name", "pair"), PAIRS.items(), ids=PAIRS.keys())
def test_a_comparison_calls_a_tie_what_students_test_cannot_tell(name, pair):
    stats = pytest.importorskip("scipy.stats", reason="the oracle is SciPy's")
    outcomes = [
        demo.Outcome(label, "", tuple((x,) for x in finals), 0.0)
        for label, finals in zip("ab", pair, strict=True)
    ]
    a, b = outcomes[0], outcomes[1].accuracies
    sentence = made_up(
        a, demo.Outcome("step decay", "", b, 0.0), demo.Outcome("fixed", "", b, 0.0)
    ).verdict()[0]
    difference = np.subtract(*pair)
    if difference.any():
        test = stats.ttest_rel(*pair)
        assert ("a tie" in sentence) == (test.pvalue > 0.05)
        assert f"{100 * difference.mean():+.1f} points" in sentence
        if len(difference) <= 10:
            interval = test.confidence_interval(0.95)
            assert f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}" in sentence
    assert name.split(",")[0] in sentence


BAD_ARGUMENTS = {
    "name": ({"name": "mnist"}, "digits, fashion-mnist"),
    "seeds": ({"seeds": 0}, "seeds must be an integer >= 1, got 0"),
    "updates": ({"updates": 39}, "updates must be an integer >= 40, got 39"),
}


def test_nothing_is_written_before_there_is_something(tmp_path):
    """Nor is anything trained for a folder that cannot be written to."""
    with pytest.raises(ValueError, match="come with scikit-learn"):
        demo.run(data_path=tmp_path, out=tmp_path / "report")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        demo.run(out=tmp_path / "file" / "report")
    if os.path.isdir("/proc/self"):  # where root's permissions allow all, and nothing can be made
        with pytest.raises(OSError, match="'/proc'"):
            demo.run(out="/proc/report")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_refused_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo.run(out=tmp_path / "report", **arguments)
    assert not (tmp_path / "report").exists()
