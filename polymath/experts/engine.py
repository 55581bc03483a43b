"""Decode groups on one worker thread: a step of each in turn, so that nobody waits for the longest.

The thread owns the models. The event loop hands groups over and gets chunks back; a group that is
cancelled or raises leaves at the next step and does not touch the others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from polymath.errors import ContextLengthExceeded, GenerationFailed, NotReady, Overloaded
from polymath.experts.decoding import Decoding
from polymath.experts.group import Chunk, DecodeGroup
from polymath.experts.lora_model import LoraModel
from polymath.experts.settings import EngineSettings

__all__ = ["Completion", "Engine"]

logger = logging.getLogger(__name__)


class Completion:
    """The answer of one group: an async iterator of chunks, to be closed when nobody listens."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._decoding: Decoding | None = None
        self._over = False

    def __aiter__(self) -> Completion:
        return self

    async def __anext__(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        chunk = await self._chunks.get()
        if isinstance(chunk, Exception):
            self._over = True
            raise GenerationFailed(f"The generation failed: {chunk}") from chunk
        self._over = chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        """Stop generating within one step."""
        if self._decoding is not None:
            self._decoding.cancelled = True

    def _deliver(self, chunk: Chunk | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
        except RuntimeError:  # the event loop is closed: the server is gone, and the reader with it
            self.close()


class Engine:
    """Runs decode groups.

    Args:
        models: base models by name; all their rows run on this engine's thread.
    """

    def __init__(self, models: Mapping[str, LoraModel], settings: EngineSettings) -> None:
        self.models = models
        self._settings = settings
        self._waiting: deque[Decoding] = deque()
        self._running: list[Decoding] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="polymath-engine", daemon=True)
        self._thread.start()

    def submit(self, groups: Sequence[DecodeGroup]) -> list[Completion]:
        """Queue groups, all or none. To be called from the event loop that reads the answers.

        Raises:
            ContextLengthExceeded: a row and its answer do not fit the model's context.
            Overloaded: the queue is full.
            NotReady: the engine is closed.
        """
        for group in groups:
            self._check_length(group)
        completions = [Completion() for _ in groups]
        with self._wake:
            if self._closed:
                raise NotReady("The server is shutting down.")
            self._check_queue(len(groups))
            for group, completion in zip(groups, completions, strict=True):
                completion._decoding = Decoding(group, self.models, completion._deliver)
                self._waiting.append(completion._decoding)
            self._wake.notify()
        return completions

    def close(self) -> None:
        """End the thread; what still runs is cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @property
    def active(self) -> int:
        """Groups that run or wait."""
        return len(self._running) + len(self._waiting)

    def _check_length(self, group: DecodeGroup) -> None:
        for row in group.rows:
            limit = self.models[row.base_model].context_length
            prompt, answer = len(row.prompt), group.sampling.max_tokens
            if prompt + answer > limit:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {limit} tokens. However, you "
                    f"requested {prompt + answer} tokens ({prompt} in the messages, {answer} in "
                    "the completion). Please reduce the length of the messages or completion.",
                    param="messages",
                )

    def _check_queue(self, groups: int) -> None:
        free = self._settings.max_num_seqs + self._settings.max_waiting - self.active
        if groups > free:
            raise Overloaded(
                f"The engine's queue is full ({self.active} groups run or wait); retry later."
            )

    def _run(self) -> None:
        if self._settings.threads is not None:
            import torch

            torch.set_num_threads(self._settings.threads)
        while self._admit():
            for decoding in self._running:
                self._step(decoding)

    def _admit(self) -> bool:
        """Let finished groups go and waiting ones in; sleep if there is none. False: closed."""
        with self._wake:
            self._running = [one for one in self._running if not (one.finished or one.cancelled)]
            self._waiting = deque(one for one in self._waiting if not one.cancelled)
            while not (self._closed or self._running or self._waiting):
                self._wake.wait()
            while self._waiting and len(self._running) < self._settings.max_num_seqs:
                self._running.append(self._waiting.popleft())
            return not self._closed

    def _step(self, decoding: Decoding) -> None:
        if decoding.cancelled:
            return
        try:
            decoding.step()
        except Exception as error:  # surfaces to the client as GenerationFailed; others go on
            logger.exception("a decode group failed")
            decoding.finished = True
            decoding.deliver(error)
