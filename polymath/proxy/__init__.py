"""Black-box models: upstreams, proxy-tuning, learned combination. Imports experts alone."""

__all__ = []
