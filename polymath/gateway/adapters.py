"""Adapters that come and go while the server runs: vLLM's two endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from polymath.errors import AdapterError, InvalidRequest, ModelNotFound
from polymath.experts import Expert, ExpertSettings, LoraModel
from polymath.gateway.protocol import LoadAdapterRequest
from polymath.gateway.settings import ROUTED_MODELS

__all__ = ["AdapterUpdates"]


class AdapterUpdates:
    """Adds adapters to the catalog and takes them away again; those of the config stay.

    Args:
        added: those that were added before; a reload keeps them.
    """

    def __init__(
        self,
        catalog: dict[str, Expert],
        models: Mapping[str, LoraModel],
        added: dict[str, ExpertSettings],
    ) -> None:
        self._catalog = catalog
        self._models = models
        self._added = added

    def load(self, request: LoadAdapterRequest) -> None:
        """Make an adapter an expert at once; its weights are read when it is first asked.

        Raises:
            InvalidRequest: the name is taken, the adapter cannot be used, or there is no such base
                model.
        """
        name = request.lora_name
        if name in ROUTED_MODELS or (name in self._catalog and name not in self._added):
            raise InvalidRequest(f"The name {name!r} is taken; choose another.", param="lora_name")
        base_model = self._base_model(request.base_model)
        folder = Path(request.lora_path)
        try:
            self._models[base_model].adapters.add(name, folder)
        except AdapterError as error:
            raise InvalidRequest(error.message, param="lora_path") from error
        except OSError as error:
            reason = f"lora_path cannot be read ({error.strerror})"
            raise InvalidRequest(reason, param="lora_path") from error
        if name in self._added:
            self._leave_base(name, base_model)
        settings = ExpertSettings(base_model=base_model, adapter=folder)
        self._catalog[name] = Expert(name, settings, ())
        self._added[name] = settings

    def unload(self, name: str) -> None:
        """Forget an adapter that `load` added; answers in progress keep it to their end.

        Raises:
            ModelNotFound: there is no such adapter.
            InvalidRequest: it belongs to the config.
        """
        if name not in self._catalog:
            raise ModelNotFound(f"The adapter {name!r} is not loaded.", param="lora_name")
        if name not in self._added:
            raise InvalidRequest(
                f"{name!r} belongs to the config file; take it out there.", param="lora_name"
            )
        base_model = self._catalog.pop(name).settings.base_model
        del self._added[name]
        self._models[str(base_model)].adapters.remove(name)

    def _leave_base(self, name: str, new: str) -> None:
        """Take an adapter that is loaded again from the base model that it stood on before."""
        old = str(self._catalog[name].settings.base_model)
        if old != new:
            self._models[old].adapters.remove(name)

    def _base_model(self, wanted: str | None) -> str:
        if wanted is None and len(self._models) == 1:
            return next(iter(self._models))
        if wanted is None or wanted not in self._models:
            names = ", ".join(self._models)
            raise InvalidRequest(f"base_model must be one of {names}.", param="base_model")
        return wanted
