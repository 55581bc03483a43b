"""The one error tree: every failure that a user can cause or see, as an OpenAI error body.

The wire format is the error object of the OpenAI API reference:
`{"error": {"message", "type", "param", "code"}}`.
"""

from collections.abc import Mapping, Sequence

__all__ = [
    "AdapterError",
    "CombinerError",
    "ConfigError",
    "ContextLengthExceeded",
    "DataError",
    "DeadlineExceeded",
    "GenerationFailed",
    "HeadersTooLarge",
    "InvalidKey",
    "InvalidRequest",
    "ModelNotFound",
    "ModelSourceError",
    "NotAllowed",
    "NotFound",
    "NotReady",
    "Overloaded",
    "PolymathError",
    "QuotaExceeded",
    "RateLimited",
    "RequestTimeout",
    "RequestTooLarge",
    "RouterArtifactError",
    "StoreUnavailable",
    "UnsupportedParameter",
    "UpstreamFailed",
    "UpstreamRefused",
    "UpstreamTimeout",
    "UpstreamUnavailable",
]


class PolymathError(Exception):
    """What was wrong, where, and what to do about it.

    Args:
        message: one or more full sentences for the user.
        param: the request field or config key that caused it.
        retry_after: seconds after which the client may come back, if not those of the class.
    """

    code: str = "internal_error"
    type: str = "server_error"
    status: int = 500
    retry_after: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if retry_after is not None:
            self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error body."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the error response."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


class InvalidRequest(PolymathError):
    code = "invalid_value"
    type = "invalid_request_error"
    status = 400


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    code = "request_too_large"
    status = 413


class HeadersTooLarge(InvalidRequest):
    code = "headers_too_large"
    status = 431


class RequestTimeout(InvalidRequest):
    """The client did not send its request in time."""

    code = "request_timeout"
    status = 408


class ModelNotFound(InvalidRequest):
    code = "model_not_found"
    status = 404


class Overloaded(PolymathError):
    """The queue is full; the client should come back after `retry_after` seconds."""

    code = "overloaded"
    type = "rate_limit_error"
    status = 429
    retry_after = 1


class InvalidKey(InvalidRequest):
    """No key, or one that is not known or was revoked."""

    code = "invalid_api_key"
    status = 401


class NotAllowed(InvalidRequest):
    """The key may not do this."""

    code = "permission_denied"
    status = 403


class NotFound(InvalidRequest):
    code = "not_found"
    status = 404


class RateLimited(PolymathError):
    """A limit of the key; `limits` are the headers that say how much is left."""

    code = "rate_limit_exceeded"
    type = "requests"
    status = 429

    def __init__(
        self,
        message: str,
        *,
        type: str = type,
        retry_after: int | None = None,
        limits: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.type = type
        self._limits = dict(limits or {})

    @property
    def headers(self) -> dict[str, str]:
        """With those that say how much is left."""
        return {**self._limits, **super().headers}


class QuotaExceeded(PolymathError):
    """The budget of the key is spent."""

    code = "insufficient_quota"
    type = "insufficient_quota"
    status = 429


class DeadlineExceeded(InvalidRequest):
    """The answer took longer than the request or the server allows."""

    code = "timeout"
    status = 408


class StoreUnavailable(PolymathError):
    """What keys, limits and the cache are kept in cannot be used."""

    code = "store_unavailable"
    status = 503
    retry_after = 1


class NotReady(PolymathError):
    code = "not_ready"
    status = 503
    retry_after = 1


class GenerationFailed(PolymathError):
    """A decode group raised; the other groups go on."""

    code = "generation_failed"


class UpstreamFailed(PolymathError):
    """An upstream cannot be reached, or sent what is no answer."""

    code = "upstream_error"
    status = 502


class UpstreamTimeout(UpstreamFailed):
    code = "upstream_timeout"
    status = 504


class UpstreamUnavailable(UpstreamFailed):
    """The upstream failed often of late and is not asked before `retry_after` seconds."""

    code = "upstream_unavailable"
    status = 503
    retry_after = 1


class UpstreamRefused(PolymathError):
    """The upstream found the request wrong; its status and error object are the client's."""

    code = "upstream_refused"
    type = "invalid_request_error"
    status = 400

    def __init__(
        self,
        message: str,
        status: int = status,
        code: str = code,
        *,
        type: str = type,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code
        self.type = type


class ConfigError(PolymathError):
    """Everything that is wrong with a config file, one line per problem."""

    code = "invalid_config"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class DataError(PolymathError):
    """A data file, or a row of one, that cannot be used; names the file and the line."""

    code = "invalid_data"


class ModelSourceError(PolymathError):
    """A base model or encoder that cannot be found, fetched or converted."""

    code = "model_unavailable"


class AdapterError(PolymathError):
    """An adapter folder that is missing, corrupt, unsafe or made for another base model."""

    code = "invalid_adapter"


class CombinerError(PolymathError):
    """A combiner folder that is missing or corrupt."""

    code = "invalid_combiner"


class RouterArtifactError(PolymathError):
    """A router folder that is missing, corrupt or made for another encoder."""

    code = "invalid_router"
