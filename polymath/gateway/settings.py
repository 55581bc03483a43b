"""The whole config file, composed of the sections that the packages own."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from polymath.experts import BaseModelSettings, EngineSettings, ExpertSettings, Secret
from polymath.gateway.access import Auth, OnFailure
from polymath.gateway.answer_cache import CacheSettings
from polymath.gateway.request_limits import RequestLimits
from polymath.gateway.topic_guard import TopicGuardSettings
from polymath.gateway.tracing import TracingSettings
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
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that serve; several of them need `store: redis://...`.",
    )
    admin_key: Secret | None = Field(
        default=None, description="Opens `/admin`; write `${VAR}`. Without it there is no `/admin`."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Web pages of these origins may ask, e.g. `https://chat.example`."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="`json` writes an object a line."
    )
    log_prompts: bool = Field(default=False, description="Prompts may stand in logs and traces.")
    watch_config: bool = Field(
        default=True, description="Reload when the config file changes; SIGHUP does it at any rate."
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
    store: Annotated[str, StringConstraints(pattern=r"^(memory|(rediss?|unix)://.+)$")] = Field(
        default="memory",
        description="Where keys, limits and the cache are kept: `memory` for one process, or the "
        "URL of a Redis that replicas share.",
    )
    state_dir: Path = Field(
        default=Path(".polymath"),
        description="`store: memory`: folder of keys and logs, relative to the config file.",
    )
    auth: Auth = Field(
        default="keys",
        description="`keys`: as soon as there are keys, every request needs one; without any, only "
        "a loopback address is served. `none`: nobody needs one.",
    )
    store_failure: OnFailure = Field(
        default="closed",
        description="While Redis is gone: `open` lets known keys in without limits, `closed` "
        "nobody.",
    )
    limits: RequestLimits = Field(
        default=RequestLimits(), description="The largest request that is served."
    )
    topic_guard: TopicGuardSettings = Field(
        default=TopicGuardSettings(), description="What is talked about."
    )
    cache: CacheSettings = Field(
        default=CacheSettings(), description="Which answers are given again."
    )
    tracing: TracingSettings = Field(
        default=TracingSettings(), description="Where traces are sent to."
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
                "path": self.router.path and root / self.router.path,
                "clusters": self.router.clusters and root / self.router.clusters,
            }
        )
        return self.model_copy(
            update={
                "experts": experts,
                "base_models": bases,
                "router": router,
                "state_dir": root / self.state_dir,
            }
        )

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
