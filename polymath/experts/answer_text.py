"""The text of an answer as its tokens arrive: whole characters only, and nothing past a stop."""

import codecs
from collections.abc import Sequence

__all__ = ["AnswerText"]


class AnswerText:
    """Bytes of tokens in, text that may be shown out.

    What could still become a stop string, or the rest of a character, is held back; so the pieces
    of a stream always add up to the text that is given at once.

    Args:
        stop: strings that end the answer; they are not part of it.
        strip_space: drop one space at the very beginning (SentencePiece).
    """

    def __init__(self, stop: Sequence[str] = (), *, strip_space: bool = False) -> None:
        self._stop = tuple(stop)
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Take the bytes of one token; give the text that is now certain."""
        return self._release(self._decoder.decode(piece), final=False)

    def finish(self) -> str:
        """The answer is over: give what was held back."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        if self._strip_space and text:
            text, self._strip_space = text.removeprefix(" "), False
        self._held += text
        certain = len(self._held)
        if not final:
            certain -= max((_overlap(self._held, stop) for stop in self._stop), default=0)
        first = min((at for at in map(self._held.find, self._stop) if at >= 0), default=None)
        # a longer stop may yet begin before the one that is complete
        self.stopped = first is not None and first <= certain
        split = certain if first is None else min(first, certain)
        released = self._held[:split]
        self._held = "" if self.stopped else self._held[split:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
