"""What the turns of a conversation say together: a forward filter over its domain.

The domain of a conversation is a hidden Markov chain: from one user turn to the next it stays with
probability `sticky`, and is drawn anew otherwise. A turn that says nothing of a domain by itself
("and why is that?") is flat evidence, so that the domain of the turns before it stands; a turn
that is clearly of another domain outweighs them (the forward algorithm, Rabiner 1989, eq. 19-21).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polymath.router.decision import Message, largest_first

__all__ = ["Reading", "belief", "user_turns"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One user turn alone.

    Attributes:
        domains: the calibrated probability of each domain, given that it is of one of them; those
            left out have none.
        out_of_scope: probability that it is of none.
    """

    domains: Mapping[str, float]
    out_of_scope: float


def belief(readings: Sequence[Reading], sticky: float) -> dict[str, float]:
    """Probability of each domain after the last of the turns, the likeliest first.

    Args:
        readings: of at least one turn, in order.
        sticky: probability that the domain stays from one turn to the next; 0 forgets all turns
            but the last.
    """
    domains = list(dict.fromkeys(domain for reading in readings for domain in reading.domains))
    flat = 1 / len(domains)
    state = dict.fromkeys(domains, flat)
    for reading in readings:
        spoken = 1 - reading.out_of_scope
        state = {
            domain: (sticky * state[domain] + (1 - sticky) * flat)
            * (reading.out_of_scope * flat + spoken * reading.domains.get(domain, 0.0))
            for domain in domains
        }
        total = sum(state.values())
        state = {domain: value / total for domain, value in state.items()}
    return largest_first(state)


def user_turns(messages: Sequence[Message], most: int) -> list[str]:
    """The texts of the last user turns, in order; at least one, if only an empty one."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return texts[-most:] or [""]
