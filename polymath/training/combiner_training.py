"""`polymath train combiner`: how much of a small model to mix into a large one (CombLM).

Both models are frozen and read the data once; what the fit needs of each answer token is kept
(Ormazabal et al. 2023, section 3), so that another kind is fitted in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.artifacts import Progress, no_progress
from polymath.errors import DataError
from polymath.experts import (
    COMBINER_CARD,
    COMBINER_GRAPH,
    CombinerCard,
    CombinerKind,
    mixing_features,
)
from polymath.training.data import ChatRow, fingerprint
from polymath.training.examples import IGNORED, encode_chat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    Floats = NDArray[np.float32]

__all__ = ["AnswerScores", "Scorer", "fit_share", "train_combiner"]

Scorer = Callable[[Sequence[int]], "Tensor"]
"""Logits after every token of a text, [tokens, vocab]; minus infinity where unknown."""

MAX_LENGTH = 1024
HELD_OUT = 3
"""One of so many conversations is held out."""
STOPPING = 4
"""One of so many conversations that are not held out says when to stop."""
HIDDEN = 16
STEPS = 400
LEARNING_RATE = 0.02
WEIGHT_DECAY = 1e-3
CACHE = "scores.npz"
UNKNOWN = -30.0
"""Nats of an answer token that a remote model does not list."""


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """What both models say of every answer token.

    Attributes:
        large, small: [tokens], log-probability of the token.
        entropy, full: [tokens, features], what a share may depend on.
        rows: [tokens], the conversation that each token is of.
    """

    large: Floats
    small: Floats
    entropy: Floats
    full: Floats
    rows: NDArray[np.int64]

    def of(self, kept: NDArray[np.bool_]) -> AnswerScores:
        """Those of some tokens."""
        return AnswerScores(
            self.large[kept],
            self.small[kept],
            self.entropy[kept],
            self.full[kept],
            self.rows[kept],
        )

    def features(self, kind: CombinerKind) -> Floats:
        """[tokens, features] that a kind of share looks at."""
        if kind == "entropy":
            return self.entropy
        return self.full if kind == "full" else self.full[:, :0]


def train_combiner(
    rows: Sequence[ChatRow],
    tokenizer: PreTrainedTokenizerBase,
    names: tuple[str, str],
    scorers: tuple[Scorer, Scorer],
    kind: CombinerKind,
    out: Path,
    seed: int = 0,
    progress: Progress = no_progress,
    models: str = "",
) -> CombinerCard:
    """Fit a combiner and write its folder.

    Args:
        rows: conversations; a third of them is held out.
        names: of the large and the small model; scorers: in the same order.
        models: tells them from others of the same names, whose scores are forgotten.
    Raises:
        DataError: there are fewer than three conversations with an answer.
    """
    key = f"{fingerprint(rows)}:{names[0]}:{names[1]}:{models}"
    scores = _cached_scores(rows, tokenizer, key, scorers, out, progress)
    held_out = scores.rows % HELD_OUT == HELD_OUT - 1
    if held_out.all() or not held_out.any():
        raise DataError(f"a combiner needs at least {HELD_OUT} conversations with an answer")
    fitted, held = scores.of(~held_out), scores.of(held_out)
    share: float | None = {"mean": 0.5}.get(kind)
    network: nn.Sequential | None = None
    if kind == "constant":
        share = fit_share(fitted.large, fitted.small)
    elif kind != "mean":
        network = _fit_network(fitted, kind, seed)
    shares = _shares(network, held.features(kind)) if network else share
    card = CombinerCard(
        kind=kind,
        large=names[0],
        small=names[1],
        share=share,
        perplexity={
            "large": _perplexity(held, 0.0),
            "small": _perplexity(held, 1.0),
            "mean": _perplexity(held, 0.5),
            "fit": _perplexity(held, shares),
        },
        tokens={"fitted": len(fitted.large), "held_out": len(held.large)},
        data_sha256=fingerprint(rows),
    )
    (out / COMBINER_GRAPH).unlink(missing_ok=True)
    if network is not None:
        _export(network, scores.features(kind).shape[1], out / COMBINER_GRAPH)
    (out / COMBINER_CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return card


def fit_share(large: Floats, small: Floats) -> float:
    """The constant share of the small model that makes some answers likeliest.

    Args:
        large, small: [tokens], log-probabilities of the tokens.
    Returns:
        From 0 to 1. The likelihood is concave in it, so that there is one best.
    """
    from scipy.optimize import minimize_scalar

    result = minimize_scalar(
        lambda share: -_mixed(large, small, share).mean(),
        bounds=(0.0, 1.0),
        method="bounded",
        options={"xatol": 1e-6},
    )
    best = min((0.0, 1.0, float(result.x)), key=lambda share: -_mixed(large, small, share).mean())
    return float(best)


def _mixed(large: Floats, small: Floats, share: Any) -> Any:
    """log((1 - share) p_large + share p_small), [tokens]."""
    import numpy as np

    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-np.asarray(share)) + large, np.log(share) + small)


def _perplexity(scores: AnswerScores, share: Any) -> float:
    return round(math.exp(-float(_mixed(scores.large, scores.small, share).mean())), 4)


def _cached_scores(
    rows: Sequence[ChatRow],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    scorers: tuple[Scorer, Scorer],
    out: Path,
    progress: Progress,
) -> AnswerScores:
    """Of the folder, if they are of the same data and models."""
    import numpy as np

    file = out / CACHE
    if file.exists():
        with np.load(file) as saved:
            if str(saved["key"]) == key:
                return AnswerScores(*(saved[name] for name in AnswerScores.__slots__))
    out.mkdir(parents=True, exist_ok=True)
    scores = _scores(rows, tokenizer, scorers, progress)
    staging = file.with_suffix(".partial.npz")
    arrays = {name: getattr(scores, name) for name in AnswerScores.__slots__}
    np.savez(staging, key=np.array(key), **arrays)
    staging.replace(file)
    return scores


def _scores(
    rows: Sequence[ChatRow],
    tokenizer: PreTrainedTokenizerBase,
    scorers: tuple[Scorer, Scorer],
    progress: Progress,
) -> AnswerScores:
    import numpy as np
    import torch

    parts: list[list[Floats]] = [[], [], [], []]
    owners: list[NDArray[np.int64]] = []
    number = 0
    for done, row in enumerate(rows):
        progress("scoring answers", done, len(rows))
        example = encode_chat(tokenizer, row, MAX_LENGTH)
        if example is None:
            continue
        labels = torch.tensor(example.labels[1:])
        answers = labels != IGNORED
        log_probs = torch.stack(
            [scorer(example.ids)[:-1][answers].log_softmax(-1) for scorer in scorers]
        )
        of_answers = labels[answers][None, :, None].expand(2, -1, 1)
        large, small = log_probs.gather(-1, of_answers)[..., 0].clamp(min=UNKNOWN)
        values = (
            large,
            small,
            mixing_features("entropy", log_probs),
            mixing_features("full", log_probs),
        )
        for part, value in zip(parts, values, strict=True):
            part.append(value.float().numpy())
        owners.append(np.full(len(large), number))
        number += 1
    progress("scoring answers", len(rows), len(rows))
    if not owners:
        raise DataError("no conversation has an answer to be scored")
    large, small, entropy, full = (np.concatenate(part) for part in parts)
    return AnswerScores(large, small, entropy, full, np.concatenate(owners))


def _fit_network(scores: AnswerScores, kind: CombinerKind, seed: int) -> nn.Sequential:
    """A network of one hidden layer that says the logit of the share; starts at the constant.

    A part of the conversations says when to stop, as there are few and a network soon knows them.
    """
    import numpy as np
    import torch

    torch.manual_seed(seed)
    features = torch.from_numpy(scores.features(kind))
    start = min(max(fit_share(scores.large, scores.small), 0.01), 0.99)
    network = _network(features, math.log(start / (1 - start)))
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    order = np.unique(scores.rows, return_inverse=True)[1]
    stopping = torch.from_numpy(order % STOPPING == STOPPING - 1)
    best, kept = math.inf, network.state_dict()
    for _ in range(STEPS):
        losses = _losses(network, features, scores)
        stopped = float(losses[stopping].detach().mean()) if stopping.any() else -math.inf
        if stopped < best:
            best, kept = stopped, {name: v.clone() for name, v in network.state_dict().items()}
        loss: Any = losses[~stopping].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if stopping.any():
        network.load_state_dict(kept)
    return network


def _losses(network: nn.Sequential, features: Tensor, scores: AnswerScores) -> Tensor:
    """Nats of each token under the mixture that the network says, [tokens]."""
    import torch

    logit = network(features)[:, 0]
    large, small = torch.from_numpy(scores.large), torch.from_numpy(scores.small)
    log_sigmoid = torch.nn.functional.logsigmoid
    return -torch.logaddexp(log_sigmoid(-logit) + large, log_sigmoid(logit) + small)


def _network(features: Tensor, start: float) -> nn.Sequential:
    """Standardises its features, and says `start` at first."""
    import torch
    from torch import nn

    scale = features.std(0).clamp(min=1e-3)
    standard = nn.Linear(features.shape[1], features.shape[1])
    hidden, last = nn.Linear(features.shape[1], HIDDEN), nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        standard.weight.copy_(torch.diag(1 / scale))
        standard.bias.copy_(-features.mean(0) / scale)
        last.weight.zero_()
        last.bias.fill_(start)
    standard.requires_grad_(False)
    return nn.Sequential(standard, hidden, nn.Tanh(), last)


def _shares(network: nn.Sequential, features: Floats) -> Floats:
    import torch

    with torch.inference_mode():
        shares: Floats = network(torch.from_numpy(features)).sigmoid()[:, 0].numpy()
    return shares


def _export(network: nn.Sequential, features: int, file: Path) -> None:
    """The network as an ONNX graph: `features` [rows, features] -> `shares` [rows, 1]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from torch import nn

    layers = [module for module in network if isinstance(module, nn.Linear)]
    nodes, initialisers, here = [], [], "features"
    for index, layer in enumerate(layers):
        names = [f"{part}.{index}" for part in ("weight", "bias", "out", "active")]
        for name, value in zip(names, (layer.weight, layer.bias), strict=False):
            initialisers.append(numpy_helper.from_array(value.detach().numpy(), name))
        nodes.append(helper.make_node("Gemm", [here, *names[:2]], [names[2]], transB=1))
        activation = (None, "Tanh", "Sigmoid")[index]
        here = names[2]
        if activation is not None:
            here = "shares" if activation == "Sigmoid" else names[3]
            nodes.append(helper.make_node(activation, [names[2]], [here]))
    graph = helper.make_graph(
        nodes,
        "comblm",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", features])],
        [helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["rows", 1])],
        initialisers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, file)
