"""The config section `experts`: one model for all kinds, and which keys each of them has."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from polymath.experts.settings import Section

__all__ = [
    "Deployment",
    "ExampleTurn",
    "ExpertSettings",
    "JudgeSettings",
    "Price",
    "SamplingDefaults",
    "Secret",
    "Url",
]


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


def _header_value(secret: SecretStr) -> SecretStr:
    """A value that can stand in an HTTP header; a line end around it is a slip."""
    value = secret.get_secret_value().strip()
    if not value or not value.isascii() or not value.isprintable():
        raise ValueError("must be printable ASCII, and not empty")
    return SecretStr(value)


def _without_secrets(url: str) -> str:
    """A URL that can be asked, and shown in logs and metrics."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("must hold no user and password; use `api_key` or `headers`")
    if parts.port == 0:
        raise ValueError("port 0 cannot be asked")
    return url


Secret = Annotated[SecretStr, AfterValidator(_header_value)]
Kind = Literal["lora", "base", "ensemble", "proxy_tuned", "upstream", "guided", "cascade"]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Url = Annotated[
    str, Field(pattern=r"^https?://[^\s/?#@]+[^\s?#]*$"), AfterValidator(_without_secrets)
]

NEEDS: Mapping[str, tuple[str, ...]] = {
    "lora": ("base_model", "adapter"),
    "base": ("base_model",),
    "ensemble": ("members",),
    "proxy_tuned": ("large", "tuned", "untuned"),
    "upstream": ("model",),
    "guided": ("guide", "upstream"),
    "cascade": ("cheap", "strong", "judge"),
}
"""Keys that an expert of a kind must have."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "ensemble": ("combine", "combiner", "top_k", "floor"),
    "proxy_tuned": ("alpha", "support", "draft"),
    "upstream": (
        "api_base",
        "api_key",
        "headers",
        "deployments",
        "timeout",
        "num_retries",
        "max_parallel",
        "max_waiting",
        "fallbacks",
    ),
    "guided": ("guide_prompt", "guide_tokens", "guide_timeout", "template"),
}
"""Keys that an expert of a kind may have, and that other kinds have no use for."""

POSTERIOR_ONLY = ("top_k", "floor")

OWN_PROMPT = ("system_prompt", "few_shot")
FRAMED = (("upstream", "system_prompt"),)
"""Of these, what an expert of a kind without a model here may have all the same."""

GUIDE_PROMPT = "State briefly the facts that one must know to answer this:\n\n{question}"
GUIDED_PROMPT = "Background knowledge, which may be incomplete or wrong:\n{background}"


class Deployment(Section):
    """One server that answers for an upstream."""

    api_base: Url = Field(
        description="URL in front of `/chat/completions`, as OpenAI's: usually ends in `/v1`."
    )
    api_key: Secret | None = Field(
        default=None, description="Sent as bearer token; write `${VAR}`."
    )
    model: str | None = Field(
        default=None, min_length=1, description="By default that of the expert."
    )


class JudgeSettings(Section):
    """Whether a cheap answer is trusted."""

    kind: Literal["logprob", "meta_ranking", "difficulty"] = Field(
        description="`logprob`: the mean log-probability of the answer; `meta_ranking`: the judge "
        "model compares it with reference answers of known quality; `difficulty`: the router's "
        "confidence in its domain."
    )
    threshold: float = Field(
        allow_inf_nan=False,
        description="A score of at least this is trusted: nats a token (at most 0), weighted "
        "votes (-1 to 1), or a probability.",
    )
    references: Path | None = Field(
        default=None,
        description="`meta_ranking`: JSONL of {prompt, answer, score}, score from 0 to 1, relative "
        "to the config file.",
    )
    expert: Name | None = Field(
        default=None, description="`meta_ranking`: who compares; by default the cheap expert."
    )
    pairs: int = Field(
        default=5, ge=1, le=50, description="`meta_ranking`: references it is compared with."
    )
    timeout: Seconds = Field(
        default=20.0,
        description="Seconds that the cheap answer and the judgement may hold an answer back; "
        "then the strong expert answers.",
    )

    def located(self, root: Path) -> "JudgeSettings":
        """The same with the path taken from a folder."""
        return self.model_copy(update={"references": self.references and root / self.references})

    @model_validator(mode="after")
    def _references_go_with_ranking(self) -> "JudgeSettings":
        if (self.kind == "meta_ranking") != (self.references is not None):
            raise ValueError("`references` goes with `kind: meta_ranking`, and only with it")
        return self


class ExpertSettings(Section):
    """An expert: a LoRA adapter on a base model, the base model under instructions, or several
    experts whose next-token distributions are combined."""

    kind: Kind = Field(
        default="lora",
        description="`lora`: an adapter; `base`: the base model itself; `ensemble`: several "
        "experts at once; `proxy_tuned`: a large model steered by a small tuned one; "
        "`upstream`: any OpenAI-compatible server; `guided`: an upstream that gets background "
        "knowledge from a small expert; `cascade`: a cheap expert first, a strong one where it "
        "is not trusted.",
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
    combine: Literal["logits", "probabilities", "posterior", "comblm"] = Field(
        default="probabilities",
        description="How an ensemble becomes one distribution: weighted logits (ELREA), weighted "
        "probabilities, probabilities whose weights follow the text (DEMix), or a learned mixture "
        "of a large and a small model (CombLM).",
    )
    combiner: Path | None = Field(
        default=None,
        description="`comblm`: folder of `polymath train combiner`, relative to the config file.",
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
    support: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="`proxy_tuned` with an upstream as `large`: its likeliest tokens to combine.",
    )
    draft: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="`proxy_tuned` with an upstream as `large`: tokens that the tuned expert "
        "drafts for one call; 0 asks for each token, by default the length follows what is "
        "accepted.",
    )
    model: str | None = Field(
        default=None, min_length=1, description="Name of the upstream's model, or of its adapter."
    )
    api_base: Url | None = Field(
        default=None,
        description="URL in front of `/chat/completions`, as OpenAI's: usually ends in `/v1`.",
    )
    api_key: Secret | None = Field(
        default=None, description="Sent as bearer token; write `${VAR}`."
    )
    headers: dict[HeaderName, Secret] = Field(
        default_factory=dict, description="Sent with every request to the upstream."
    )
    deployments: tuple[Deployment, ...] = Field(
        default=(), description="Several servers of one upstream, in place of `api_base`."
    )
    timeout: Seconds = Field(
        default=600.0,
        description="Seconds for a whole answer, or until the next event of a stream.",
    )
    num_retries: int = Field(
        default=2, ge=0, le=10, description="Tries after the first, before the first byte only."
    )
    max_parallel: int | None = Field(
        default=None, ge=1, description="Requests at a time; more of them wait."
    )
    max_waiting: int | None = Field(
        default=None,
        ge=0,
        description="Of them, those that may wait; beyond it the answer is 429. By default half of "
        "`max_parallel`, so that nobody waits much longer than for half an answer.",
    )
    fallbacks: tuple[Name, ...] = Field(
        default=(), description="Experts that answer, in this order, if the upstream cannot."
    )
    guide: Name | None = Field(default=None, description="The expert that writes the background.")
    upstream: Name | None = Field(
        default=None, description="The expert that answers with the background."
    )
    guide_prompt: str = Field(
        default=GUIDE_PROMPT, description="What the guide is asked; holds `{question}`."
    )
    guide_tokens: int = Field(default=200, ge=1, description="Longest background, in tokens.")
    guide_timeout: Seconds = Field(
        default=10.0, description="Seconds; if the background is late, the answer goes without."
    )
    template: str = Field(
        default=GUIDED_PROMPT,
        description="How the background is put into the system message; holds `{background}`.",
    )
    cheap: Name | None = Field(default=None, description="The expert that answers first.")
    strong: Name | None = Field(
        default=None, description="The expert that answers where the first is not trusted."
    )
    judge: JudgeSettings | None = Field(default=None, description="Who decides about that.")
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
        return named | self._named("large", "tuned", "untuned")

    def helpers(self) -> Mapping[str, str]:
        """The experts that answer for this one as a whole: name -> the key that names it."""
        named = dict.fromkeys(self.fallbacks, "fallbacks")
        return named | self._named("guide", "upstream", "cheap", "strong")

    @property
    def has_row(self) -> bool:
        """Whether it is one model here, whose logits can be combined with others."""
        return self.base_model is not None

    def _named(self, *keys: str) -> dict[str, str]:
        names = {key: getattr(self, key) for key in keys}
        return {name: key for key, name in names.items() if name is not None}

    def _given(self, key: str) -> bool:
        default = type(self).model_fields[key].get_default(call_default_factory=True)
        return bool(getattr(self, key) != default)

    @property
    def weighs_by_router(self) -> bool:
        """Whether the router gives the members of the ensemble their weights."""
        learned = self.combine == "comblm"
        return self.kind == "ensemble" and not learned and not isinstance(self.members, Mapping)

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
        for key in OWN_PROMPT:
            if not self.has_row and getattr(self, key) and (self.kind, key) not in FRAMED:
                raise ValueError(
                    f"an expert of kind {self.kind} has no `{key}`; its experts have their own"
                )
        return self

    @model_validator(mode="after")
    def _upstream_is_somewhere(self) -> "ExpertSettings":
        if self.kind == "upstream" and (self.api_base is None) == (not self.deployments):
            raise ValueError("an expert of kind upstream needs `api_base` or `deployments`")
        if self.deployments and self.api_key is not None:
            raise ValueError("with `deployments` each of them has its own `api_key`")
        if len({(one.api_base, one.model) for one in self.deployments}) < len(self.deployments):
            raise ValueError("two of the `deployments` are alike")
        return self

    @model_validator(mode="after")
    def _templates_have_their_place(self) -> "ExpertSettings":
        for key, place in (("guide_prompt", "{question}"), ("template", "{background}")):
            if place not in getattr(self, key):
                raise ValueError(f"`{key}` must hold {place}")
        return self

    @model_validator(mode="after")
    def _options_fit_combine(self) -> "ExpertSettings":
        for key in POSTERIOR_ONLY:
            if self.combine != "posterior" and self._given(key):
                raise ValueError(f"`{key}` goes with `combine: posterior`, and only with it")
        if (self.combine == "comblm") != (self.combiner is not None):
            raise ValueError("`combiner` goes with `combine: comblm`, and only with it")
        if self.combine == "comblm" and (
            not isinstance(self.members, tuple) or len(self.members) != 2
        ):
            raise ValueError("`combine: comblm` needs `members: [LARGE, SMALL]`")
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
