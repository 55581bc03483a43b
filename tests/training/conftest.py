"""Shared by the tests of training: a tiny BERT, prompts that it can tell apart."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from polymath.training import PromptRow

WORDS = {
    "coding": ("python", "loop", "compiler", "function", "variable", "recursion"),
    "law": ("court", "statute", "tenant", "contract", "appeal", "judge"),
    "math": ("integral", "matrix", "prime", "theorem", "fraction", "polynomial"),
    "none": ("weather", "song", "pizza", "holiday", "football", "garden"),
}
FILLERS = ("what", "about", "this", "the", "does", "please", "how", "with")
DOMAINS = ("coding", "law", "math")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
POSITIONS = 256


class Killed(Exception):
    """Stands for the end of the process."""


class Progress:
    """Follows a training; kills it when it comes to a step of a stage."""

    def __init__(self, fatal: str | None = None, step: int = 0) -> None:
        self.fatal = fatal
        self.step = step
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done, total))
        if stage == self.fatal and done >= self.step:
            raise Killed

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(stage for stage, _, _ in self.seen))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random BERT with a WordPiece tokenizer, as a HF folder; it has dropout."""
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A model this small is slower on two threads, which may sum in another order each time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_tiny_bert(folder: Path, seed: int = 0) -> Path:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [word for group in (*WORDS.values(), FILLERS) for word in group]
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    bert = BertModel(config)
    with torch.no_grad():  # words should say more than their places
        bert.embeddings.position_embeddings.weight.mul_(0.1)
    bert.save_pretrained(folder)
    return folder


def prompts(
    count: int, *domains: str, source: str | None = "made/train", seed: int = 0
) -> list[PromptRow]:
    """So many different prompts of each domain, told apart by their words."""
    rng = random.Random(f"{seed} {source}")
    return [
        PromptRow(text=prompt_text(rng, WORDS[domain]), domain=domain, source=source)
        for domain in domains
        for _ in range(count)
    ]


def prompt_text(rng: random.Random, words: Sequence[str]) -> str:
    chosen = [*rng.sample(words, 3), *rng.sample(FILLERS, rng.randint(1, 4))]
    rng.shuffle(chosen)
    return " ".join(chosen) + f" {rng.randint(0, 999)}?"
