"""What gateway replicas share: one protocol, in process memory or in Redis."""

from polymath.gateway.store.memory import MemoryStore
from polymath.gateway.store.protocol import (
    Admission,
    Limits,
    Refused,
    Settlement,
    Store,
    Verdict,
)
from polymath.gateway.store.redis import RedisStore

__all__ = [
    "Admission",
    "Limits",
    "MemoryStore",
    "RedisStore",
    "Refused",
    "Settlement",
    "Store",
    "Verdict",
]
