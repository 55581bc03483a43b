"""Log lines as JSON objects, each with the id of the request that it belongs to."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

import orjson

__all__ = ["REQUEST_ID", "JsonFormatter", "set_up_logging"]

REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")
"""Of the request that is being served."""

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
CHATTY = ("httpx", "httpcore", "hpack")
"""They log headers, in which keys may stand."""


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, request id and what was given as `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            values["request_id"] = request_id
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        fields = getattr(record, "fields", {})
        try:
            return orjson.dumps({**values, **fields}, default=str).decode()
        except TypeError:  # a half character, or a number beyond 64 bits
            return json.dumps({**values, **fields}, default=str)


def set_up_logging(level: str, form: Literal["text", "json"]) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
