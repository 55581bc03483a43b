"""Routers and experts from data, and their evaluation. Imports router, experts and proxy."""

from polymath.training.adapter_card import adapter_card, write_card
from polymath.training.data import (
    ChatRow,
    ChatTurn,
    PromptRow,
    fingerprint,
    read_chats,
    read_prompts,
)
from polymath.training.engine_perplexity import answer_perplexity
from polymath.training.expert_matrix import expert_matrix
from polymath.training.lora import LoraTrainer
from polymath.training.perplexity import Perplexity, measure_perplexity
from polymath.training.recipe import ExpertReport, LoraRecipe
from polymath.training.router_evaluation import evaluate_router
from polymath.training.router_head import train_router_head

__all__ = [
    "ChatRow",
    "ChatTurn",
    "ExpertReport",
    "LoraRecipe",
    "LoraTrainer",
    "Perplexity",
    "PromptRow",
    "adapter_card",
    "answer_perplexity",
    "evaluate_router",
    "expert_matrix",
    "fingerprint",
    "measure_perplexity",
    "read_chats",
    "read_prompts",
    "train_router_head",
    "write_card",
]
