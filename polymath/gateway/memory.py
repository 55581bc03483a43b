"""The memory of the process once everything is loaded."""

import ctypes
import gc
import sys

__all__ = ["settle", "unsettle"]


def settle() -> None:
    """Call when everything is loaded: what lives on is no longer gone through for garbage, which
    takes longer than many a request, and what loading has left behind goes back to the system."""
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)


def unsettle() -> None:
    """Call when something of what was loaded may have become garbage."""
    gc.unfreeze()
