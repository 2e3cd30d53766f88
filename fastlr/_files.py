"""Writing result files whole or not at all, which every part of the package shares."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from fastlr._checks import file_name


@contextmanager
def replacing(
    path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w", newline: str | None = None
) -> Iterator[IO[Any]]:
    """A file to write to, which takes the place of the one at ``path`` when it is complete.

    Whoever reads ``path`` finds what stood there before or all that is new; after an error, a kill or a full
    disk, too. It is written to a hidden file beside it, which only a kill leaves behind. Permissions are
    those that ``open()`` would give, and a symbolic link stays one. What is no regular file, such as
    ``/dev/stdout``, is simply written to.

    Args:
        path: of the file.
        mode: ``"w"``: text, in UTF-8; ``"wb"``: bytes.
        newline: as of ``open()``.

    Raises:
        TypeError: the path is no path.
        OSError: as of ``open()``; or the folder or disk does not take the file.
    """
    name = file_name("path", path)
    if name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    target = os.path.realpath(name)
    encoding = None if "b" in mode else "utf-8"
    before: os.stat_result | None = None
    with contextlib.suppress(FileNotFoundError):
        before = os.stat(target)
    if before is not None:
        if not stat.S_ISREG(before.st_mode):
            with open(target, mode, newline=newline, encoding=encoding) as file:
                yield file
            return
        # Says what open() has against writing to it, which renaming does not ask for.
        os.close(os.open(target, os.O_WRONLY))
    beside = os.path.join(os.path.dirname(target), f".fastlr-{secrets.token_hex(8)}.tmp")
    try:
        with _opened(beside, target, mode.replace("w", "x"), newline, encoding) as file:
            if before is not None:
                if hasattr(os, "chown"):
                    with contextlib.suppress(PermissionError):  # only root gives files away
                        os.chown(beside, before.st_uid, before.st_gid)
                os.chmod(beside, stat.S_IMODE(before.st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):  # it may not be there
            os.unlink(beside)
        raise


def _opened(path: str, target: str, mode: str, newline: str | None, encoding: str | None) -> IO[Any]:
    """A new file; an error names ``target``, which the caller knows."""
    try:
        # "x", and not tempfile, whose files nobody else may read: open() itself knows the umask.
        return open(path, mode, newline=newline, encoding=encoding)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(text)


def writable_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """A folder that is there or can be made, which shows before the work that it is for. It is not made.

    Raises:
        TypeError: the path is no path.
        OSError: something on the way to it is no folder, or may not be written to.
    """
    folder = Path(file_name(name, path))
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    try:  # what permissions allow a file system may refuse, as /proc does
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(there)) from error
    return folder
