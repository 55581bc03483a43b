"""Routers and experts from data, and their evaluation. Imports router, experts and proxy."""

from polymath.training.adapter_card import adapter_card, write_card
from polymath.training.cascade_evaluation import (
    JudgedAnswer,
    cascade_curve,
    is_right,
    write_cascade_report,
)
from polymath.training.cluster_recipe import ClusterRecipe, expert_folder
from polymath.training.cluster_training import ClusterTraining
from polymath.training.clustering import Algorithm, centroids_of, cluster
from polymath.training.combiner_training import Scorer, train_combiner
from polymath.training.data import (
    OUT_OF_SCOPE,
    ChatRow,
    ChatTurn,
    ConversationRow,
    PromptRow,
    fingerprint,
    read_chats,
    read_conversations,
    read_prompts,
)
from polymath.training.encoder_finetuning import EncoderFinetuner, FinetuneRecipe
from polymath.training.engine_perplexity import answer_perplexity
from polymath.training.examples import IGNORED, encode_chat
from polymath.training.expert_matrix import expert_matrix
from polymath.training.instruction_gradients import InstructionGradients
from polymath.training.labelled import LabelledPrompts
from polymath.training.linear_head import find_centres, fit_head
from polymath.training.lora import LoraTrainer
from polymath.training.metrics import mcnemar
from polymath.training.perplexity import Perplexity, measure_perplexity
from polymath.training.prompt_styles import with_typos
from polymath.training.prompt_vectors import encode_prompts
from polymath.training.recipe import ExpertReport, LoraRecipe
from polymath.training.router_evaluation import (
    RoutedPrompt,
    evaluate_conversations,
    route_prompts,
    summarise_routing,
)
from polymath.training.router_report import write_router_report
from polymath.training.router_training import RouterRecipe, train_router
from polymath.training.source_folds import SourceFold, source_folds

__all__ = [
    "Algorithm",
    "IGNORED",
    "InstructionGradients",
    "find_centres",
    "ClusterRecipe",
    "ClusterTraining",
    "cascade_curve",
    "centroids_of",
    "cluster",
    "encode_chat",
    "expert_folder",
    "encode_prompts",
    "source_folds",
    "fit_head",
    "SourceFold",
    "LabelledPrompts",
    "EncoderFinetuner",
    "OUT_OF_SCOPE",
    "ChatRow",
    "ChatTurn",
    "ConversationRow",
    "ExpertReport",
    "FinetuneRecipe",
    "JudgedAnswer",
    "LoraRecipe",
    "LoraTrainer",
    "Perplexity",
    "PromptRow",
    "RoutedPrompt",
    "RouterRecipe",
    "Scorer",
    "adapter_card",
    "answer_perplexity",
    "evaluate_conversations",
    "expert_matrix",
    "fingerprint",
    "is_right",
    "mcnemar",
    "measure_perplexity",
    "read_chats",
    "read_conversations",
    "read_prompts",
    "route_prompts",
    "summarise_routing",
    "train_combiner",
    "train_router",
    "with_typos",
    "write_card",
    "write_cascade_report",
    "write_router_report",
]
