"""The groups that run: one step for all of them at a time.

In each step every row that decodes takes its last token and one prompt takes a chunk, all rows of a
base model together (continuous batching, Orca, Yu et al. 2022; chunked prefill, Sarathi, Agrawal et
al. 2023); then each group whose rows are fed combines, samples and delivers. A group that raises
ends, and does not touch the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from polymath.errors import PolymathError
from polymath.experts.group import Chunk
from polymath.experts.lora_model import Feed, LoraModel
from polymath.experts.prefix_cache import PrefixCache
from polymath.experts.scheduler import Scheduler
from polymath.experts.sequence import Sequence

__all__ = ["Group", "RunningBatch"]

logger = logging.getLogger(__name__)


class Group(Protocol):
    """Rows that stay together; what they are fed for is the group's own matter."""

    rows: list[Sequence]

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done."""
        ...

    @property
    def ready(self) -> bool:
        """Whether there is something to compute."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of cache that the rows may need together."""
        ...

    def hungry(self) -> list[Sequence]:
        """Rows that must be fed before the next step."""
        ...

    def step(self) -> Any:
        """What `deliver` hands over; called when nobody is hungry."""
        ...

    def deliver(self, result: Any) -> None:
        """Hand over what a step gave, or the exception that ends the group."""
        ...

    def fail(self, error: Exception) -> None:
        """End the group with an error."""
        ...


class RunningBatch:
    """Groups in progress on some base models.

    Args:
        prefill_chunk: prompt tokens fed in one step.

    Attributes:
        groups: those that run, the oldest first.
        prompt_tokens, generated_tokens: fed and sampled so far.
    """

    def __init__(
        self, models: Mapping[str, LoraModel], prefixes: PrefixCache, prefill_chunk: int
    ) -> None:
        self.groups: list[Group] = []
        self.prompt_tokens = self.generated_tokens = 0
        self._models = models
        self._prefixes = prefixes
        self._scheduler = Scheduler(prefill_chunk, self._reuse)

    def start(self, group: Group) -> None:
        """Give a group's rows their adapters and places in the cache."""
        self.groups.append(group)
        with _ending(group):
            for row in group.rows:
                model = self._models[row.base_model]
                if row.adapter is not None:
                    row.weights = model.adapters.weights(row.adapter)
                model.slots.join(row, row.longest)

    @property
    def busy(self) -> bool:
        """Whether a group has something to compute, or is over and to be let go."""
        return any(group.ready or group.over for group in self.groups)

    def release(self) -> None:
        """Let go of the groups that are over, and keep what they have cached for the next turn."""
        over = [group for group in self.groups if group.over]
        for group in over:
            for row in group.rows:
                self._leave(row)
        self.groups = [group for group in self.groups if group not in over]

    def step(self) -> None:
        """Feed rows; then let every group whose rows are fed take its step.

        What was sampled is delivered at the end, so that the event loop works on it while the next
        step computes; prompts are kept after that, so that no first token waits for it.
        """
        rows = [row for group in self.groups for row in _hungry(group)]
        prompts: list[Sequence] = []
        for name in dict.fromkeys(row.base_model for row in rows):
            of_model = [row for row in rows if row.base_model == name]
            prompts += self._feed(self._models[name], of_model)
        results: list[tuple[Group, Any]] = []
        for group in self.groups:
            if not _hungry(group) and group.ready and not group.over:
                with _ending(group):
                    results.append((group, group.step()))
        self.generated_tokens += sum(isinstance(result, Chunk) for _, result in results)
        for group, result in results:
            group.deliver(result)
        for row in prompts:
            self._keep(row)

    def _feed(self, model: LoraModel, rows: list[Sequence]) -> list[Sequence]:
        """Feed what the scheduler says; the rows whose prompts are complete with that."""
        feeds = self._scheduler.feeds(rows)
        try:
            model.forward(feeds)
        except Exception:
            logger.exception("a batch failed; its rows are fed one by one")
            for feed in feeds:
                self._feed_alone(model, feed)
        prompts = [feed for feed in feeds if feed.count > 1]
        self.prompt_tokens += sum(feed.count for feed in prompts)
        return [feed.sequence for feed in prompts if not feed.sequence.pending]

    def _feed_alone(self, model: LoraModel, feed: Feed) -> None:
        if feed.sequence.pending < feed.before:
            return  # it was fed before the batch failed
        owner = next(group for group in self.groups if feed.sequence in group.rows)
        with _ending(owner):
            model.forward([feed])

    def _leave(self, row: Sequence) -> None:
        slots = self._models[row.base_model].slots
        if slots.holds(row):
            if row.cached > row.prompt_tokens:
                self._keep(row)
            slots.leave(row)

    def _reuse(self, row: Sequence) -> None:
        """Of the prompt alone: a row that joins late counts how likely it finds the answer."""
        prompt = row.tokens[: row.prompt_tokens]
        saved = self._prefixes.longest((row.base_model, row.adapter), prompt)
        if saved is not None:
            self._models[row.base_model].slots.write(row, saved)
            row.cached = saved.shape[3]

    def _keep(self, row: Sequence) -> None:
        if self._prefixes.max_tokens >= row.cached:
            saved = self._models[row.base_model].slots.read(row)
            self._prefixes.keep((row.base_model, row.adapter), row.tokens[: row.cached], saved)


def _hungry(group: Group) -> list[Sequence]:
    if not group.over:
        with _ending(group):
            return group.hungry()
    return []


@contextmanager
def _ending(group: Group) -> Iterator[None]:
    """Whatever is raised inside ends the group, surfaces to its client, and nowhere else."""
    try:
        yield
    except PolymathError as error:
        group.fail(error)
    except Exception as error:
        logger.exception("a decode group failed")
        group.fail(error)
