"""Adapters for frameworks."""

from __future__ import annotations

from fastlr.integrations.schedulers import ReadOnlyScheduler

__all__ = ["ReadOnlyScheduler"]
