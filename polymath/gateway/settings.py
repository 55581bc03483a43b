"""The whole config file, composed of the sections that the packages own."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from polymath.experts import BaseModelSettings, EngineSettings, ExpertSettings
from polymath.router import RouterSettings

__all__ = ["ROUTED_MODELS", "ServerSettings", "Settings"]

ROUTED_MODELS = ("polymath", "auto")
"""Model names that let the router choose; no expert may have one."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=128)]


class ServerSettings(BaseModel):
    """Where and how the gateway listens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8080, ge=0, le=65535, description="0 picks a free port.")
    log_level: str = Field(
        default="info",
        pattern="^(critical|error|warning|info|debug)$",
        description="critical, error, warning, info or debug.",
    )
    max_body_bytes: int = Field(
        default=4 * 1024 * 1024, ge=1024, description="Larger request bodies are refused with 413."
    )
    allow_runtime_lora_updating: bool = Field(
        default=False,
        description="Serve `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM does. "
        "Whoever reaches the server can then have it read adapter folders.",
    )
    shutdown_grace: float = Field(
        default=30.0, ge=0, description="Seconds that running answers get after SIGTERM."
    )


class Settings(BaseModel):
    """`polymath.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Polymath")

    server: ServerSettings = Field(default=ServerSettings(), description="The HTTP endpoint.")
    base_models: dict[Name, BaseModelSettings] = Field(
        default_factory=dict, description="Models that experts stand on, by name."
    )
    experts: dict[Name, ExpertSettings] = Field(
        min_length=1, description="Who can answer, by name."
    )
    router: RouterSettings = Field(description="Who chooses the expert.")
    engine: EngineSettings = Field(
        default=EngineSettings(), description="How the local models run."
    )

    def located(self, root: Path) -> "Settings":
        """The same settings with the paths taken from `root`, the folder of the config file.

        A Hugging Face id as an expert's `base_model` becomes a base model of that name.
        """
        experts = {
            name: expert.model_copy(
                update={
                    "adapter": expert.adapter and root / expert.adapter,
                    "combiner": expert.combiner and root / expert.combiner,
                    "judge": expert.judge and expert.judge.located(root),
                }
            )
            for name, expert in self.experts.items()
        }
        hub_ids = {e.base_model for e in experts.values() if e.base_model and "/" in e.base_model}
        bases = {name: BaseModelSettings(model=name) for name in sorted(hub_ids)} | {
            name: base.model_copy(update={"model": _located_source(base.model, root)})
            for name, base in self.base_models.items()
        }
        router = self.router.model_copy(
            update={
                "path": root / self.router.path,
                "clusters": self.router.clusters and root / self.router.clusters,
            }
        )
        return self.model_copy(update={"experts": experts, "base_models": bases, "router": router})

    def domains(self) -> dict[str, str]:
        """Router domain -> expert that answers it; an expert without `domains` has its own name."""
        return {
            domain: name
            for name, expert in self.experts.items()
            for domain in expert.domains_of(name)
        }

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Router domain -> prompts by which the config makes it known."""
        return {
            expert.domains_of(name)[0]: expert.examples
            for name, expert in self.experts.items()
            if expert.examples
        }


def _located_source(source: str, root: Path) -> str:
    return str(root / source) if (root / source).exists() else source
