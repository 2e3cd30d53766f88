"""Packages that only a part of fastlr needs: each is imported where it is used, and missed with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ModuleNotFoundError):
    """A package of one of fastlr's extras is not installed."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of packages that ``fastlr[name]`` brings.

    Raises:
        MissingExtra: one of them is missing; says how it is installed.

    >>> with extra("plot"):
    ...     import no_such_package
    Traceback (most recent call last):
    fastlr._extras.MissingExtra: no_such_package is not installed; pip install 'fastlr[plot]' brings it
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0].replace("sklearn", "scikit-learn")
        raise MissingExtra(
            f"{package} is not installed; pip install 'fastlr[{name}]' brings it", name=error.name
        ) from error
