"""Loading without the bars and warnings of transformers, which would bury our own lines."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

__all__ = ["quiet_loading"]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars, one of which cannot be switched off, and FutureWarnings."""
    import warnings

    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
