"""A stand-in for vLLM's and llama.cpp's `/v1/completions`: a real model behind real HTTP.

It speaks of tokens by their ids, as vLLM does if asked, or by their texts, as llama-cpp-python
does, with all that this server does to them (`tests/proxy/test_llama_peer.py` asks the real one).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from polymath.experts import Engine, Row

BASE = "smollm2"

Place = tuple[int, Tensor | None]
"""A token and the logits that it was drawn from."""


class ScoringServer:
    """One model of an engine as an upstream.

    Attributes:
        by_id: whether tokens are named by their ids.
        adapter: of the base model that answers.
        requests: bodies so far.
        retold: what stands in place of the names of tokens, if anything.
    """

    def __init__(self, engine: Engine, by_id: bool, adapter: str | None = None) -> None:
        self.by_id = by_id
        self.adapter = adapter
        self.requests: list[dict[str, Any]] = []
        self.retold: dict[str, str] = {}
        self._engine = engine
        self._model = engine.models[BASE]

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL while it serves."""
        app = Starlette(routes=[Route("/v1/completions", self._complete, methods=["POST"])])
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join()

    async def _complete(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.requests.append(body)
        if not self.by_id and "return_tokens_as_token_ids" in body:
            return _json({"error": {"message": "unknown field", "code": "unknown"}}, 400)
        tokens = self._tokens(body["prompt"])
        logits = await self._logits(tokens)
        told = _by_id if self.by_id else self._by_text
        places = told(tokens, logits, bool(body.get("echo")))
        logprobs = {
            "tokens": [self._name(token) for token, _ in places],
            "top_logprobs": [
                None if row is None else self._likeliest(row, token, body["logprobs"])
                for token, row in places
            ],
        }
        ended = not self.by_id and int(logits[-1].argmax()) in self._model.eos_ids
        return _json(
            {
                "choices": [{"index": 0, "text": "", "logprobs": logprobs}],
                "usage": {"prompt_tokens": len(tokens), "completion_tokens": 0 if ended else 1},
            }
        )

    def _by_text(self, tokens: Sequence[int], logits: Tensor, echo: bool) -> list[Place]:
        """No begin token, no generated end; and a prompt without a begin token is off by one."""
        begin, ends = self._model.tokenizer.bos_token_id, self._model.eos_ids
        generated = [int(logits[-1].argmax())]
        said = [token for token in generated if token not in ends]
        if not echo:
            return [(token, logits[-1]) for token in said]
        listed = [*tokens[1 if tokens[0] == begin else 0 :], *said]
        rows = [None, *logits[1:]]
        return [(token, row) for token, row in zip(listed, rows, strict=False) if token != begin]

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return list(self._model.tokenizer.encode(prompt, add_special_tokens=False))

    async def _logits(self, tokens: Sequence[int]) -> Tensor:
        row = self._engine.score(Row(BASE, self.adapter, tuple(tokens[:1])), len(tokens))
        try:
            blocks = [await row.extend(())]
            if len(tokens) > 1:
                blocks.append(await row.extend(tokens[1:]))
            return torch.cat(blocks)
        finally:
            row.close()

    def _likeliest(self, logits: Tensor, token: int, count: int) -> dict[str, float]:
        """The likeliest, and the token that stands there; of one name the last one counts."""
        log_probs = logits.log_softmax(-1)
        ids = [*log_probs.topk(count).indices.tolist(), token]
        return {self._name(index): float(log_probs[index]) for index in ids}

    def _name(self, index: int) -> str:
        piece = self._model.vocabulary.piece(index).decode("utf-8", "ignore")
        name = f"token_id:{index}" if self.by_id else piece
        return self.retold.get(name, name)


def _by_id(tokens: Sequence[int], logits: Tensor, echo: bool) -> list[Place]:
    """All tokens of the prompt if it is echoed, and the generated one."""
    told = [*tokens, int(logits[-1].argmax())]
    rows = [None, *logits]
    return list(zip(told, rows, strict=True))[0 if echo else -1 :]


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
