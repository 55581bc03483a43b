"""The decode engine: a queue in front of a batch that groups join and leave at any step.

One worker thread owns the models. The event loop hands groups over and gets chunks back; what does
not fit beside the groups that run waits, in order, and what does not fit the queue is refused.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polymath.errors import ContextLengthExceeded, InvalidRequest, NotReady, Overloaded
from polymath.experts.completion import Completion
from polymath.experts.decoding import Decoding
from polymath.experts.group import DecodeGroup, Row
from polymath.experts.lora_model import LoraModel
from polymath.experts.onnx_network import OnnxNetwork
from polymath.experts.prefix_cache import PrefixCache
from polymath.experts.running_batch import Group, RunningBatch
from polymath.experts.scored_row import ScoredRow
from polymath.experts.sequence import Sequence as RowInProgress
from polymath.experts.settings import EngineSettings

__all__ = ["Engine", "EngineStats"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine.

    Attributes:
        running, waiting: groups.
        rows: rows of the running groups.
        kv_tokens: tokens of cache that the running groups may need.
        prefix_queried, prefix_hit: prompt tokens so far, and those that were cached already.
        prefix_tokens: tokens that the prefix cache holds.
        prompt_tokens, generated_tokens: prompt tokens fed and tokens sampled so far.
        loaded_adapters: adapters in memory, of all base models.
    """

    running: int
    waiting: int
    rows: int
    kv_tokens: int
    prefix_queried: int
    prefix_hit: int
    prefix_tokens: int
    prompt_tokens: int
    generated_tokens: int
    loaded_adapters: int


class Engine:
    """Runs decode groups.

    Args:
        models: base models by name; all their rows run on this engine's thread.
    """

    def __init__(self, models: Mapping[str, LoraModel], settings: EngineSettings) -> None:
        self.models = models
        self._settings = settings
        self._prefixes = PrefixCache(settings.prefix_cache_tokens)
        self._batch = RunningBatch(models, self._prefixes, settings.prefill_chunk)
        self._waiting: deque[Group] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="polymath-engine", daemon=True)
        self._thread.start()

    def submit(self, groups: Sequence[DecodeGroup]) -> list[Completion]:
        """Queue groups, all or none. To be called from the event loop that reads the answers.

        Raises:
            ContextLengthExceeded: a row and its answer do not fit the model's context.
            InvalidRequest: a group does not fit the engine, even alone.
            ModelNotFound: an adapter is not known.
            Overloaded: the queue is full.
            NotReady: the engine is closed.
        """
        completions = [Completion() for _ in groups]
        decodings = [
            self._decoding(group, completion)
            for group, completion in zip(groups, completions, strict=True)
        ]
        self._queue(decodings)
        return completions

    def score(self, row: Row, max_tokens: int) -> ScoredRow:
        """Queue a row that is fed from outside. To be called from the event loop that uses it.

        Args:
            max_tokens: so many may be added to its prompt at a time.
        Raises:
            ContextLengthExceeded, InvalidRequest, ModelNotFound, Overloaded, NotReady: as `submit`.
        """
        return self.score_together([row], max_tokens)[0]

    def score_together(self, rows: Sequence[Row], max_tokens: int) -> list[ScoredRow]:
        """Queue rows that wait for each other, all or none; else as `score`."""
        scored = [self._scored(row, max_tokens) for row in rows]
        self._check_size(scored)
        self._queue(scored)
        return scored

    def close(self) -> None:
        """End the thread; what still runs or waits ends with an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        for group in [*self._batch.groups, *self._waiting]:
            if not group.over:
                group.fail(_shutting_down())

    @property
    def active(self) -> int:
        """Groups that run or wait."""
        return len(self._batch.groups) + len(self._waiting)

    def stats(self) -> EngineStats:
        """Counts and sums, for metrics; may be a step old."""
        batch, prefixes = self._batch, self._prefixes
        running = list(batch.groups)
        return EngineStats(
            running=len(running),
            waiting=len(self._waiting),
            rows=sum(len(group.rows) for group in running),
            kv_tokens=sum(group.longest for group in running),
            prefix_queried=prefixes.queried,
            prefix_hit=prefixes.hit,
            prefix_tokens=prefixes.tokens,
            prompt_tokens=batch.prompt_tokens,
            generated_tokens=batch.generated_tokens,
            loaded_adapters=sum(len(model.adapters.loaded) for model in self.models.values()),
        )

    def _queue(self, groups: Sequence[Group]) -> None:
        with self._wake:
            if self._closed:
                raise _shutting_down()
            self._check_queue(groups)
            self._waiting += groups
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _decoding(self, group: DecodeGroup, completion: Completion) -> Decoding:
        rows = []
        for row in group.rows:
            model = self.models[row.base_model]
            _check_length(len(row.prompt), group.sampling.max_tokens, model.context_length)
            adapter = None if row.adapter is None else model.adapters.find(row.adapter)
            rows.append(RowInProgress(row, adapter, group.sampling.max_tokens))
        first = self.models[group.rows[0].base_model]
        decoding = Decoding(group, rows, first.vocabulary, first.eos_ids, completion.deliver)
        completion.on_close(decoding.cancel)
        self._check_size([decoding])
        return decoding

    def _scored(self, row: Row, max_tokens: int) -> ScoredRow:
        model = self.models[row.base_model]
        _check_length(len(row.prompt), max_tokens, model.context_length)
        adapter = None if row.adapter is None else model.adapters.find(row.adapter)
        return ScoredRow(row, adapter, max_tokens, self._notify)

    def _check_size(self, groups: Sequence[Group]) -> None:
        """The groups of one answer can run at the same time."""
        settings = self._settings
        rows = sum(len(group.rows) for group in groups)
        longest = sum(group.longest for group in groups)
        if rows > settings.max_num_seqs:
            raise InvalidRequest(
                f"The answer needs {rows} rows, but the engine runs at most "
                f"{settings.max_num_seqs}; raise engine.max_num_seqs."
            )
        if longest > settings.kv_cache_tokens:
            raise ContextLengthExceeded(
                f"The answer may need {longest} tokens of cache, but the engine has "
                f"{settings.kv_cache_tokens}. Please reduce the length of the messages or "
                "completion, or raise engine.kv_cache_tokens.",
                param="messages",
            )

    def _check_queue(self, decodings: Sequence[Group]) -> None:
        """The queue has places for what cannot start at once."""
        waiting = [one for one in [*self._waiting, *decodings] if not one.over]
        if len(waiting) > self._settings.max_waiting + self._startable(waiting):
            raise Overloaded(
                f"The engine's queue is full ({self.active} groups run or wait); retry later."
            )

    def _startable(self, waiting: Sequence[Group]) -> int:
        """How many of those that wait, in their order, fit beside those that run."""
        running = [group for group in self._batch.groups if not group.over]
        rows = sum(len(group.rows) for group in running)
        tokens = sum(group.longest for group in running)
        for count, group in enumerate(waiting):
            rows += len(group.rows)
            tokens += group.longest
            if rows > self._settings.max_num_seqs or tokens > self._settings.kv_cache_tokens:
                return count
        return len(waiting)

    def _run(self) -> None:
        import torch

        if all(isinstance(model.network, OnnxNetwork) for model in self.models.values()):
            # what is left for torch is small, and a second thread pool would fight for the cores
            torch.set_num_threads(1)
        elif self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        while self._admit():
            self._batch.step()

    def _admit(self) -> bool:
        """Let finished groups go and waiting ones in; sleep if there is none. False: closed."""
        self._batch.release()
        with self._wake:
            self._drop_over()
            while not (self._closed or self._batch.busy or self._startable(self._waiting)):
                self._wake.wait()
                self._drop_over()
            for _ in range(self._startable(self._waiting)):
                self._batch.start(self._waiting.popleft())
            return not self._closed

    def _drop_over(self) -> None:
        """Nobody waits behind a group that is not wanted any more."""
        self._waiting = deque(one for one in self._waiting if not one.over)


def _shutting_down() -> NotReady:
    return NotReady("The server is shutting down.")


def _check_length(prompt: int, answer: int, limit: int) -> None:
    if prompt + answer > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, you "
            f"requested {prompt + answer} tokens ({prompt} in the messages, {answer} in "
            "the completion). Please reduce the length of the messages or completion.",
            param="messages",
        )
