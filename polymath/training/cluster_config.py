"""The config that serves a folder of clusters."""

from __future__ import annotations

from pathlib import Path

from polymath.router import BASE_FOLDER, ClusterCard
from polymath.training.cluster_recipe import BASE_WEIGHT, TEMPERATURE, expert_folder

__all__ = ["write_cluster_config"]

CONFIG_FILE = "polymath.yaml"


def write_cluster_config(out: Path, card: ClusterCard, top_k: int) -> None:
    """Write `polymath.yaml` into the folder."""
    import yaml

    experts = {
        "clusters-base": {
            "base_model": "base",
            "adapter": BASE_FOLDER,
            "description": "Learned from all data.",
        }
    } | {
        label: {
            "base_model": "base",
            "adapter": expert_folder(Path(), index).name,
            "description": f"Learned from {card.sizes[index]} conversations that pull alike.",
        }
        for index, label in enumerate(card.labels)
    }
    config = {
        "base_models": {"base": {"model": _absolute(card.base_model)}},
        "experts": experts,
        "router": {
            "kind": "gradient",
            "path": ".",
            "fallback": "clusters-base",
            "top_k": top_k,
            "base_weight": BASE_WEIGHT,
            "temperature": TEMPERATURE,
        },
    }
    (out / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source
