"""The gradients of prompts for the router, by the model and the adapter that the config names."""

import hashlib
from collections.abc import Sequence
from typing import Any

from polymath.errors import RouterArtifactError
from polymath.experts import encode_prompt, open_features, prepare_base_model
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
            f"adapter: `adapter: {settings.router.cluster_folder}/base`"
        )
    weights = (expert.adapter / "adapter_model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != card.base_sha256:
        raise RouterArtifactError(
            f"{expert.adapter}, the adapter of the fallback {name!r}, is not the base adapter that "
            f"the clusters were found with: {settings.router.cluster_folder}/base"
        )
    folder = prepare_base_model(settings.base_models[expert.base_model].model)
    features, tokenizer = open_features(
        folder, expert.adapter, card.dimensions, card.projection_seed, card.layers
    )

    def read(messages: Sequence[Message]) -> Any:
        return features.of([encode_prompt(tokenizer, messages, card.max_length)])[0]

    return read
