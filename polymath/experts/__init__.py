"""Base models, adapters, the decode engine and logit combination.

Imports nothing of ours but errors and artifact folders; torch is loaded with the first model, not
with this package.
"""

from polymath.experts.adapter import (
    ADAPTER_WEIGHTS,
    AdapterFile,
    adapter_sha256,
    read_adapter,
)
from polymath.experts.answer_text import AnswerText
from polymath.experts.answer_writer import AnswerWriter
from polymath.experts.attribution import attribute
from polymath.experts.catalog import Expert, adapters_on, build_catalog, expert_row, load_models
from polymath.experts.chat import Message, frame_conversation, render_chat
from polymath.experts.combiner import (
    Combiner,
    CombinerState,
    Mixture,
    Posterior,
    ProxyTuning,
    Select,
    WeightedLogits,
    posterior_weights,
)
from polymath.experts.comblm import (
    COMBINER_CARD,
    COMBINER_GRAPH,
    CombinerCard,
    CombinerKind,
    CombLM,
    mixing_features,
    open_combiner,
)
from polymath.experts.completion import Completion
from polymath.experts.engine import Engine, EngineStats
from polymath.experts.expert_settings import (
    Deployment,
    ExampleTurn,
    ExpertSettings,
    JudgeSettings,
    Price,
    SamplingDefaults,
    Secret,
    Url,
)
from polymath.experts.gradient_features import (
    AdamMoments,
    GradientFeatures,
    Prompt,
    encode_prompt,
    open_features,
)
from polymath.experts.grammar import Grammar, GrammarKind, GrammarSpec
from polymath.experts.graph_files import prepare_graph
from polymath.experts.group import (
    Attribution,
    Chunk,
    DecodeGroup,
    FinishReason,
    Row,
    ScoredToken,
)
from polymath.experts.lora_model import LoraModel, runs_on_onnx
from polymath.experts.model_files import prepare_base_model, weight_shapes
from polymath.experts.plan import (
    Plan,
    plan_answer,
    plan_together,
    unlike_vocabularies,
    vocabulary_conflicts,
)
from polymath.experts.projection import SignProjection
from polymath.experts.quiet import quiet_loading
from polymath.experts.sampling import Sampler, SamplingParams, certainty
from polymath.experts.scored_row import ScoredRow
from polymath.experts.settings import BaseModelSettings, EngineSettings
from polymath.experts.vocabulary import Vocabulary, read_vocabulary

__all__ = [
    "ADAPTER_WEIGHTS",
    "COMBINER_CARD",
    "COMBINER_GRAPH",
    "AdamMoments",
    "AdapterFile",
    "AnswerText",
    "AnswerWriter",
    "Attribution",
    "BaseModelSettings",
    "Chunk",
    "CombLM",
    "Combiner",
    "CombinerCard",
    "CombinerKind",
    "CombinerState",
    "Completion",
    "DecodeGroup",
    "Deployment",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "ExampleTurn",
    "Expert",
    "ExpertSettings",
    "FinishReason",
    "GradientFeatures",
    "Grammar",
    "GrammarKind",
    "GrammarSpec",
    "JudgeSettings",
    "LoraModel",
    "Message",
    "Mixture",
    "Plan",
    "Posterior",
    "Price",
    "Prompt",
    "ProxyTuning",
    "Row",
    "Sampler",
    "SamplingDefaults",
    "SamplingParams",
    "Secret",
    "ScoredRow",
    "ScoredToken",
    "Select",
    "SignProjection",
    "Url",
    "Vocabulary",
    "WeightedLogits",
    "adapter_sha256",
    "adapters_on",
    "attribute",
    "build_catalog",
    "certainty",
    "encode_prompt",
    "expert_row",
    "frame_conversation",
    "load_models",
    "mixing_features",
    "open_combiner",
    "open_features",
    "plan_answer",
    "plan_together",
    "posterior_weights",
    "prepare_base_model",
    "prepare_graph",
    "quiet_loading",
    "read_adapter",
    "read_vocabulary",
    "render_chat",
    "runs_on_onnx",
    "unlike_vocabularies",
    "vocabulary_conflicts",
    "weight_shapes",
]
