"""A recording: a reading that shows itself, as a page, in a notebook, as pictures in a folder."""

from __future__ import annotations

import html
import os
from pathlib import Path

from nested_learning._files import write_text
from nested_learning.lens.figures import save_figures
from nested_learning.lens.page import page
from nested_learning.lens.traces import Traces

PAGE = "lens.html"
FRAME_HEIGHT = 900  # pixels, in a notebook


class Recording(Traces):
    """Everything that was seen while a model read a text; see `Traces` for its fields.

    A notebook shows it as the page.
    """

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the page, lens.html, and the pictures into a folder, which is made where it is missing.

        Raises:
            OSError, ValueError: a file cannot be written.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / PAGE, page(self))
        return [target / PAGE, *save_figures(self, target)]

    def _repr_html_(self) -> str:
        """The page in a frame of its own, whose styles and scripts do not reach the notebook's."""
        return (
            f'<iframe style="width:100%;height:{FRAME_HEIGHT}px;border:0" '
            f'srcdoc="{html.escape(page(self))}"></iframe>'
        )
