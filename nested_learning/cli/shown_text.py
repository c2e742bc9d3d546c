"""Text on stdout as it is generated."""

from __future__ import annotations

from typing import Any

from transformers import TextStreamer


class ShownText(TextStreamer):
    """A streamer that prints, and may go on without a reader.

    Args:
        tokenizer: decodes.
        outlives_reader: generation is to go on where the other end of the pipe has left, since what it
            leads to is kept; else the BrokenPipeError ends it.

    Attributes:
        left: the error of a reader that has left.
    """

    def __init__(self, tokenizer: Any, outlives_reader: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._outlives_reader = outlives_reader
        self.left: BrokenPipeError | None = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text, with a line break at its end."""
        try:
            if self.left is None:
                super().on_finalized_text(text, stream_end)
        except BrokenPipeError as error:
            if not self._outlives_reader:
                raise
            self.left = error
