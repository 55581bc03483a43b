"""What an upstream calls a token: by its id, as vLLM does if asked, or by its text.

A token is known by its text only if no other token of whole characters has the same. Of parts of
characters the text is what is whole in them: ` ` of many, and of most the empty one, which control
tokens have too. So it may be the end of the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from polymath.experts import LoraModel

__all__ = ["ID", "NAMELESS", "TokenNames"]

ID = "token_id:"
NAMELESS = ""


class TokenNames:
    """Names of the tokens of a local model.

    Attributes:
        end: the token that ends an answer.
        ambiguous: names that parts of characters have as well, and control tokens.
    """

    def __init__(self, local: LoraModel, by_id: bool) -> None:
        self.by_id = by_id
        self._vocabulary = local.vocabulary
        self.end = min(local.eos_ids)
        self._ids = {} if by_id else self._ids_by_text()
        self.ambiguous = frozenset() if by_id else self._ambiguous()

    def name(self, index: int) -> str:
        """What a token is called."""
        if self.by_id:
            return f"{ID}{index}"
        return self._vocabulary.piece(index).decode("utf-8", "ignore")

    def id(self, name: str) -> int | None:
        """The token of a name; None if it is not known."""
        if not self.by_id:
            return self._ids.get(name)
        number = name.removeprefix(ID)
        return int(number) if number.isdecimal() else None

    def can_be_told(self, draft: Sequence[int]) -> bool:
        """Whether a draft arrives as it is: half a character is another text."""
        if not self.by_id:
            try:
                b"".join(map(self._vocabulary.piece, draft)).decode()
            except UnicodeDecodeError:
                return False
        return True

    def _ids_by_text(self) -> dict[str, int]:
        """Of tokens that are whole characters, and of the end."""
        pieces = {index: self._piece(index) for index in range(len(self._vocabulary))}
        whole = {index: text for index, text in pieces.items() if text}
        often = Counter(whole.values())
        ids = {text: index for index, text in whole.items() if often[text] == 1}
        return {**ids, NAMELESS: self.end}

    def _ambiguous(self) -> frozenset[str]:
        often = Counter(map(self.name, range(len(self._vocabulary))))
        return frozenset(name for name in self._ids if often[name] > 1) | {NAMELESS}

    def _piece(self, index: int) -> str | None:
        try:
            return self._vocabulary.piece(index).decode()
        except UnicodeDecodeError:
            return None
