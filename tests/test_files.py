"""Result files are whole or as before: after an error, a kill, a full disk."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from native import toolchain

import fastlr
from fastlr import _files, plotting

LRS = np.geomspace(1e-5, 1.0, 60)
RESULT = fastlr.RangeTestResult(LRS, 2.0 + np.log10(LRS / 0.03) ** 2 / 5)
GRID = fastlr.RangeTestGrid(({"momentum": 0.0}, {"momentum": 0.9}), (RESULT, RESULT))

with_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib"
)

WRITERS = {
    "text": lambda path: _files.write_text(path, "all of it\n"),
    "result to_json": RESULT.to_json,
    "result to_csv": RESULT.to_csv,
    "grid to_csv": GRID.to_csv,
    "picture": pytest.param(RESULT.plot, marks=with_matplotlib),
    "picture of a grid": pytest.param(GRID.plot, marks=with_matplotlib),
    "picture of a schedule": pytest.param(
        lambda path: fastlr.Cosine(0.1, 0.0, 10).plot(path=path), marks=with_matplotlib
    ),
}
each_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


@each_writer
def test_a_new_file_takes_the_place_of_the_old_one(write, tmp_path):
    path = tmp_path / "result.png"
    path.write_text("the old one" * 10_000)
    write(path)
    assert 0 < path.stat().st_size < 110_000
    assert b"the old one" not in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@each_writer
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_an_error_leaves_the_old_file_and_nothing_else(write, error, there, tmp_path, monkeypatch):
    path = tmp_path / "result.png"
    if there:
        path.write_text("the old one")

    def full(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", full)  # where a disk that is full says so at the latest
    with pytest.raises(type(error)):
        write(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the old one"] * there


def test_an_error_in_the_midst_of_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "range.json"
    RESULT.to_json(path)
    before = path.read_bytes()
    broken = fastlr.RangeTestResult(LRS, RESULT.losses)
    object.__setattr__(broken, "metric_name", object())  # which JSON cannot say
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.to_json(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@with_matplotlib
def test_a_format_that_does_not_exist_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="supported"):
        RESULT.plot(tmp_path / "picture.nonsense")
    assert list(tmp_path.iterdir()) == []


@with_matplotlib
@pytest.mark.parametrize(
    ("name", "written", "start"),
    [
        ("a.png", "a.png", b"\x89PNG"),
        ("a.PDF", "a.PDF", b"%PDF"),
        ("a.svg", "a.svg", b"<?xml"),
        ("a", "a.png", b"\x89PNG"),
        ("a.b.png", "a.b.png", b"\x89PNG"),
    ],
)
def test_the_suffix_says_the_format(name, written, start, tmp_path):
    plotting.plot_range_test(RESULT, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [written]
    assert (tmp_path / written).read_bytes().startswith(start)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_that_open_gives(mask, tmp_path):
    previous = os.umask(mask)
    try:
        with open(tmp_path / "plain", "w"):
            pass
        _files.write_text(tmp_path / "ours", "x")
        for name, mode in (("private", 0o600), ("shared", 0o664)):
            (tmp_path / name).touch()
            (tmp_path / name).chmod(mode)
            _files.write_text(tmp_path / name, "x")
    finally:
        os.umask(previous)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"plain": 0o666 & ~mask, "ours": 0o666 & ~mask, "private": 0o600, "shared": 0o664}


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_text("old")
    (tmp_path / "link").symlink_to("folder/real")
    _files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_text() == "new"


def test_what_is_no_file_is_written_to(tmp_path):
    _files.write_text(os.devnull, "x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    for folder in (tmp_path, f"{tmp_path / 'new'}{os.sep}"):
        with pytest.raises(IsADirectoryError):
            RESULT.to_csv(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_is_not_replaced(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="result"):
        _files.write_text(path, "new")
    assert path.read_text() == "old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/result\.csv"):
        RESULT.to_csv(tmp_path / "nowhere" / "result.csv")


# Writes the same two results in turn, as fast as it can.
LOOP = """
import sys
import numpy as np
import fastlr

lrs = np.geomspace(1e-5, 1.0, 2000)
results = [fastlr.RangeTestResult(lrs, np.full(2000, level)) for level in (1.0, 2.0)]
results[0].to_json(sys.argv[1])
print("ready", flush=True)
while True:
    for result in results:
        result.to_json(sys.argv[1])
"""


def test_a_kill_leaves_a_whole_file(tmp_path):
    path = tmp_path / "range.json"
    for delay in (0.0, 0.004, 0.011, 0.017):
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE, cwd=toolchain.TESTS
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        losses = json.loads(path.read_text())["losses"]
        assert losses in ([1.0] * 2000, [2.0] * 2000)
        assert len(fastlr.RangeTestResult.from_json(path).losses) == 2000
