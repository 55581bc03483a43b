"""One prompt in other clothes: frames, manners and slips that do not change its domain.

Trained on such variants, a router reads what is asked and not how (data augmentation). Each
variant is drawn anew, so that no two epochs see the same text.
"""

import random
from collections.abc import Callable

__all__ = ["restyle", "with_typos"]

OPENINGS = (
    "Question: ",
    "Q: ",
    "Q. ",
    "Problem: ",
    "Task: ",
    "Input: ",
    "Context: ",
    "User: ",
    "Hey, ",
    "Quick one: ",
    "Hello! ",
    "I have a question. ",
    "Can you tell me: ",
    "Could you help me with something? ",
    "Please help me with this: ",
    "Hi, hope you are well. Could you help me with the following? ",
    "Answer the following question.\n\n",
    "Answer the question below as well as you can.\n\n",
    "Choose the correct answer.\n\n",
    "Read the text and respond.\n\n",
    "The following is an item from an examination.\n\n",
    "You are a helpful assistant. ",
)
CLOSINGS = (
    " Thanks!",
    " Thank you in advance.",
    " Please explain.",
    " Please explain step by step.",
    " Keep it short.",
    " Give me a detailed answer.",
    "\nAnswer:",
    "\nAnswer with one letter.",
    "\n\nLet's think step by step.",
)
LONG_WORD = 4
TYPO_RATE = 0.1


def restyle(text: str, rng: random.Random, strength: float) -> str:
    """A variant of the text.

    Args:
        strength: probability of the commonest change; the others are rarer in proportion.
    """
    changes: tuple[tuple[float, Callable[[str], str]], ...] = (
        (1.0, lambda value: rng.choice(OPENINGS) + value),
        (0.5, lambda value: value + rng.choice(CLOSINGS)),
        (1.0, lambda value: with_typos(value, rng, TYPO_RATE)),
        (0.5, str.lower),
        (0.25, lambda value: value.rstrip("?.! ") or value),
    )
    for share, change in changes:
        if rng.random() < strength * share:
            text = change(text)
    return text


def with_typos(text: str, rng: random.Random, rate: float) -> str:
    """The text with a slip in a share of its longer words."""
    words = text.split(" ")
    return " ".join(
        _misspelt(word, rng) if len(word) >= LONG_WORD and rng.random() < rate else word
        for word in words
    )


def _misspelt(word: str, rng: random.Random) -> str:
    """Two letters swapped, one dropped or one doubled."""
    place = rng.randrange(len(word) - 1)
    before, first, second, after = (
        word[:place],
        word[place],
        word[place + 1],
        word[place + 2 :],
    )
    slips = (second + first, second, first + first + second)
    return before + rng.choice(slips) + after
