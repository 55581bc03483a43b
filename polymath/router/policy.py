"""From domain probabilities to the experts that answer."""

from collections.abc import Mapping
from dataclasses import dataclass

from polymath.router.decision import Allowed, Combine, Source, largest_first, within

__all__ = ["Choice", "Policy"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Weights over experts (summing to 1), what decided, and whether they answer together."""

    weights: Mapping[str, float]
    source: Source
    combine: Combine = "select"


@dataclass(frozen=True, slots=True)
class Policy:
    """When to trust the likeliest domain, when to ask several experts, when to fall back.

    Attributes:
        owners: domain -> expert; other domains belong to the fallback.
        fallback: expert for what is out of scope or below `min_confidence`.
        margin: the likeliest expert answers alone if its weight leads by at least so much.
        top_k: so many experts answer together otherwise, unless `combine` is `select`.
    """

    owners: Mapping[str, str]
    fallback: str
    min_confidence: float = 0.0
    margin: float = 0.0
    top_k: int = 2
    combine: Combine = "select"

    def choose(
        self,
        probabilities: Mapping[str, float],
        in_scope: bool = True,
        allowed: Allowed = None,
    ) -> Choice:
        """Who answers, given the probability of each domain (summing to 1).

        Args:
            allowed: experts that may answer. Without the fallback, what is out of scope goes to the
                likeliest of them.
        """
        trusted = in_scope and max(probabilities.values()) >= self.min_confidence
        if not trusted and (allowed is None or self.fallback in allowed):
            return Choice({self.fallback: 1.0}, "fallback")
        weights = within(self._by_expert(probabilities), allowed)
        if not trusted:
            return Choice(weights, "fallback")
        if self.combine == "select" or not self._unsure(weights):
            return Choice(weights, "encoder")
        best = dict(list(weights.items())[: self.top_k])
        total = sum(best.values())
        together = {expert: weight / total for expert, weight in best.items()}
        return Choice(together, "encoder", self.combine)

    def _by_expert(self, probabilities: Mapping[str, float]) -> dict[str, float]:
        """Weights of the experts, the largest first."""
        weights: dict[str, float] = {}
        for domain, probability in probabilities.items():
            expert = self.owners.get(domain, self.fallback)
            weights[expert] = weights.get(expert, 0.0) + probability
        return {name: weight for name, weight in largest_first(weights).items() if weight > 0}

    def _unsure(self, weights: Mapping[str, float]) -> bool:
        first, *others = weights.values()
        return bool(others) and first - others[0] < self.margin
