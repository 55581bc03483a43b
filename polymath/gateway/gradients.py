"""The gradients of prompts for the router, by the model and the adapter that the config names."""

from collections.abc import Sequence
from typing import Any

from polymath.errors import AdapterError, ModelSourceError, RouterArtifactError
from polymath.experts import (
    adapter_sha256,
    encode_prompt,
    open_features,
    prepare_base_model,
    read_adapter,
    weight_shapes,
)
from polymath.gateway.settings import Settings
from polymath.router import ClusterCard, Message, PromptFeatures

__all__ = ["prompt_features"]


def prompt_features(settings: Settings, card: ClusterCard) -> PromptFeatures:
    """Load the base model of the clusters with its base adapter, which the fallback expert has.

    Raises:
        RouterArtifactError: the fallback has no adapter, or another one than the clusters.
        ModelSourceError: the base model cannot be used.
    """
    name = settings.router.fallback
    expert = settings.experts.get(name)
    if expert is None or expert.adapter is None or expert.base_model is None:
        raise RouterArtifactError(
            f"the fallback {name!r} of a gradient router must be an expert with the clusters' base "
            f"adapter: `adapter: {settings.router.cluster_folder}/base`",
            param="fallback",
        )
    folder = prepare_base_model(settings.base_models[expert.base_model].model)
    try:
        read_adapter(expert.adapter, weight_shapes(folder))
    except AdapterError as error:
        raise RouterArtifactError(error.message, param="fallback") from error
    if adapter_sha256(expert.adapter) != card.base_sha256:
        raise RouterArtifactError(
            f"{expert.adapter}, the adapter of the fallback {name!r}, is not the base adapter that "
            f"the clusters were found with: {settings.router.cluster_folder}/base",
            param="fallback",
        )
    try:
        features, tokenizer = open_features(
            folder, expert.adapter, card.dimensions, card.projection_seed, card.layers
        )
    except Exception as error:  # transformers and peft raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ModelSourceError(f"{folder}: cannot be loaded ({reason})") from error

    def read(messages: Sequence[Message]) -> Any:
        return features.of([encode_prompt(tokenizer, messages, card.max_length)])[0]

    return read
