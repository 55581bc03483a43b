"""The `polymath` command: where the gateway and the training meet, above both."""

__all__ = []
