"""The figure that every plot returns. Imports matplotlib, and is imported where that is needed."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that a notebook shows as its picture, whatever matplotlib's backend is."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        data = buffer.getvalue()
        # A PNG says its size after eight bytes of signature and eight of the first chunk's length and name.
        pixels = {"width": data[16:20], "height": data[20:24]}
        # Drawn with more pixels than it is wide in the notebook, it stays sharp where a screen has them.
        shown = {name: round(100 * int.from_bytes(b, "big") / self.dpi) for name, b in pixels.items()}
        return data, shown
