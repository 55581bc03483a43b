"""The adapters of one base model, by name: weights are read when first used, and let go again.

Loading and unloading happen while the engine serves. A row holds the adapter that it started with,
so that neither an unload nor an eviction touches an answer in progress.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from polymath.errors import AdapterError, ModelNotFound
from polymath.experts.adapter import AdapterFile, read_adapter
from polymath.experts.lora_weights import LoraWeights

__all__ = ["AdapterBank", "KnownAdapter"]


class KnownAdapter:
    """An adapter that rows may use; its identity, not its name, says which weights are meant."""

    def __init__(self, name: str, file: AdapterFile) -> None:
        self.name = name
        self.file = file
        self.weights: LoraWeights | None = None


class AdapterBank:
    """Adapters by name, at most `max_loaded` of them in memory.

    Args:
        base_shapes: shapes of the base model's tensors (`weight_shapes`).
        read: reads the weights of a checked adapter.
        modules: those that the network can adapt; None is all.
    """

    def __init__(
        self,
        base_shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str, AdapterFile], LoraWeights],
        max_loaded: int,
        modules: Collection[str] | None = None,
    ) -> None:
        self._base_shapes = base_shapes
        self._read = read
        self._max_loaded = max_loaded
        self._modules = modules
        self._known: dict[str, KnownAdapter] = {}
        self._loaded: list[KnownAdapter] = []  # the least recently used comes first
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters that rows may use."""
        return tuple(self._known)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Those in memory, the least recently used first."""
        return tuple(adapter.name for adapter in self._loaded)

    def add(self, name: str, folder: Path) -> None:
        """Check an adapter and make it known, in place of one of the same name.

        Raises:
            AdapterError: it is missing, corrupt, or made for another base model.
        """
        known = KnownAdapter(name, self.check(folder))
        with self._lock:
            self._forget(name)
            self._known[name] = known

    def check(self, folder: Path) -> AdapterFile:
        """The file of an adapter that could be added.

        Raises:
            AdapterError: it could not.
        """
        file = read_adapter(folder, self._base_shapes)
        for module in file.ranks:
            if self._modules is not None and module not in self._modules:
                raise AdapterError(
                    f"{folder}: module {module} cannot be adapted on the int8 path; "
                    "set `engine.backend: torch`"
                )
        return file

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ModelNotFound: there is none of this name.
        """
        with self._lock:
            self._find(name)
            self._forget(name)

    def find(self, name: str) -> KnownAdapter:
        """The adapter of that name.

        Raises:
            ModelNotFound: there is none.
        """
        with self._lock:
            return self._find(name)

    def weights(self, adapter: KnownAdapter) -> LoraWeights:
        """The weights of an adapter, read now if need be; the least recently used make room."""
        with self._lock:
            if adapter.weights is None:
                adapter.weights = self._read(adapter.name, adapter.file)
            weights = adapter.weights
            if self._known.get(adapter.name) is adapter:
                self._used(adapter)
            else:
                adapter.weights = None  # unloaded meanwhile: the row alone holds them
            return weights

    def _used(self, adapter: KnownAdapter) -> None:
        if adapter in self._loaded:
            self._loaded.remove(adapter)
        self._loaded.append(adapter)
        while len(self._loaded) > self._max_loaded:
            self._loaded.pop(0).weights = None

    def _find(self, name: str) -> KnownAdapter:
        known = self._known.get(name)
        if known is None:
            raise ModelNotFound(f"The adapter {name!r} is not loaded.", param="model")
        return known

    def _forget(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is not None and known in self._loaded:
            self._loaded.remove(known)
            known.weights = None
