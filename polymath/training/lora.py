"""`polymath train expert`: a LoRA adapter (Hu et al. 2021) from example conversations.

The whole order of batches follows from the data and the seed, so that a killed run goes on at its
last checkpoint and ends with the weights that an unbroken run would have had.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.errors import DataError
from polymath.experts import ADAPTER_WEIGHTS, quiet_loading
from polymath.training.data import ChatRow, fingerprint
from polymath.training.examples import (
    Example,
    answer_losses,
    collate,
    encode_chats,
    length_batches,
    padding_id,
)
from polymath.training.perplexity import Perplexity, measure_perplexity
from polymath.training.recipe import ExpertReport, LoraRecipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Advance", "LoraTrainer"]

CHECKPOINT_FOLDER = ".checkpoint"
CHECKPOINT_SECONDS = 30.0
CHECKPOINT_KEYS = frozenset({"fingerprint", "step", "seconds", "adapter", "optimizer"})
WARMUP_SHARE = 0.05
MAX_GRADIENT_NORM = 1.0

FACTOR = re.compile(r"(layers\.\d+\..+)\.(lora_[AB])\.default\.weight$")
"""Names of low-rank factors in a PEFT model."""

Advance = Callable[[int, int, float], Any]
"""Called with (tokens trained, tokens in all, loss of the last step)."""


class LoraTrainer:
    """One adapter in training on one base model.

    Args:
        model_folder: Hugging Face folder of the base model.
        rows: the conversations to learn.
        recipe: rank, targets, budget, seed.
        out: folder of the adapter; a checkpoint of the same base, recipe and data is gone on with.
        start: folder of the adapter to go on from, of the same shape; by default a new one.
    Raises:
        DataError: no row has an answer within `max_length`, or a target module does not exist.
    """

    def __init__(
        self,
        model_folder: Path,
        rows: Sequence[ChatRow],
        recipe: LoraRecipe,
        out: Path,
        start: Path | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self.recipe = recipe
        self.out = out
        self.rows = rows
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_folder)
        self.examples = self._encode(rows)
        self.schedule = _schedule(self.examples, recipe)
        self.total_tokens = sum(self._tokens(batch) for batch in self.schedule)
        self.model = _peft_model(model_folder, recipe)
        self.fingerprint = f"{fingerprint(rows)}:{recipe.model_dump_json()}"
        self.base_sha256 = _base_sha256(model_folder)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        if start is not None:
            self._start_from(start)

    def train(self, advance: Advance = lambda done, total, loss: None) -> float:
        """Run the schedule to its end, from the last checkpoint if there is one.

        Returns:
            Seconds spent training, those before the checkpoint included.
        """
        import torch

        parameters = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.recipe.learning_rate, weight_decay=0.0)
        first, spent = self._resume(optimizer)
        done = sum(self._tokens(batch) for batch in self.schedule[:first])
        saved = time.monotonic()
        started = saved - spent
        for step in range(first, len(self.schedule)):
            batch = self.schedule[step]
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * _warmup_cosine(step, len(self.schedule))
            loss = self._step(batch, optimizer)
            done += self._tokens(batch)
            advance(done, self.total_tokens, loss)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                self._checkpoint(optimizer, step + 1, saved - started)
        seconds = time.monotonic() - started
        self._checkpoint(optimizer, len(self.schedule), seconds)
        self.moments = _moments(self.model, optimizer)
        return seconds

    def finish(self, base_model: str, held_out: Sequence[ChatRow], seconds: float) -> ExpertReport:
        """Save the adapter and measure what it gained on held-out conversations.

        Raises:
            DataError: no held-out row has an answer within `max_length`; nothing is saved then.
        """
        examples = self._encode(held_out, "held-out row")
        self.save()
        before, after = self._measure(examples)
        return ExpertReport(
            base_model=base_model,
            recipe=self.recipe,
            data_sha256=fingerprint(self.rows),
            rows=len(self.examples),
            steps=len(self.schedule),
            tokens=self.total_tokens,
            seconds=round(seconds, 1),
            eval_rows=len(examples),
            eval_tokens=after.tokens,
            loss_before=before.loss,
            loss_after=after.loss,
        )

    def save(self) -> None:
        """Write the adapter: float16 safetensors and PEFT's config; drop the checkpoint."""
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.requires_grad:
                    weight.copy_(weight.half())
        self.out.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self.model)
        tensors = {name: weight.half().contiguous() for name, weight in state.items()}
        config = self.model.peft_config["default"]
        config.inference_mode = True
        config.base_model_name_or_path = None
        config.save_pretrained(str(self.out))
        partial = self.out / f"{ADAPTER_WEIGHTS}.tmp"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(self.out / ADAPTER_WEIGHTS)
        shutil.rmtree(self.out / CHECKPOINT_FOLDER, ignore_errors=True)

    def evaluate(self, rows: Sequence[ChatRow]) -> tuple[Perplexity, Perplexity]:
        """Perplexity of the answers without and with the adapter."""
        return self._measure(self._encode(rows, "held-out row"))

    def _start_from(self, adapter: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load

        data = (adapter / ADAPTER_WEIGHTS).read_bytes()
        self.fingerprint += f":{hashlib.sha256(data).hexdigest()}"
        set_peft_model_state_dict(self.model, load(data))

    def _measure(self, examples: Sequence[Example]) -> tuple[Perplexity, Perplexity]:
        pad = padding_id(self.tokenizer)
        with self.model.disable_adapter():
            before = measure_perplexity(self.model, examples, pad)
        return before, measure_perplexity(self.model, examples, pad)

    def _encode(self, rows: Sequence[ChatRow], kind: str = "row") -> list[Example]:
        examples = encode_chats(self.tokenizer, rows, self.recipe.max_length)
        if not examples:
            raise DataError(
                f"no {kind} has an answer within its first {self.recipe.max_length} tokens; "
                "raise max_length"
            )
        return examples

    def _tokens(self, batch: Sequence[int]) -> int:
        return sum(len(self.examples[index].ids) for index in batch)

    def _step(self, batch: Sequence[int], optimizer: Optimizer) -> float:
        import torch

        self.model.train()
        tensors = collate([self.examples[index] for index in batch], padding_id(self.tokenizer))
        with torch.autocast("cpu", torch.bfloat16, enabled=_bfloat16(self.recipe.precision)):
            loss = answer_losses(self.model, tensors).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def _checkpoint(self, optimizer: Optimizer, step: int, seconds: float) -> None:
        import torch
        from peft import get_peft_model_state_dict

        folder = self.out / CHECKPOINT_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "fingerprint": self.fingerprint,
            "base_sha256": self.base_sha256,
            "step": step,
            "seconds": seconds,
            "adapter": get_peft_model_state_dict(self.model),
            "optimizer": optimizer.state_dict(),
        }
        partial = folder / "state.pt.tmp"
        torch.save(state, partial)
        os.replace(partial, folder / "state.pt")

    def _resume(self, optimizer: Optimizer) -> tuple[int, float]:
        """Steps and seconds that the checkpoint has behind it; (0, 0) without one."""
        from peft import set_peft_model_state_dict

        file = self.out / CHECKPOINT_FOLDER / "state.pt"
        if not file.exists():
            return 0, 0.0
        state = _load_checkpoint(file)
        # older checkpoints do not say
        base = state.get("base_sha256", self.base_sha256)
        if (state["fingerprint"], base) != (self.fingerprint, self.base_sha256):
            raise DataError(
                f"{file}: a checkpoint of another base model, another recipe or other data; "
                "delete that folder or choose another --out"
            )
        set_peft_model_state_dict(self.model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), float(state["seconds"])


def _load_checkpoint(file: Path) -> dict[str, Any]:
    import torch

    try:
        state = dict(torch.load(file, weights_only=True))
        if missing := CHECKPOINT_KEYS - state.keys():
            raise KeyError(*missing)
    except Exception as error:  # damaged bytes fail in pickle, zipfile or torch
        raise DataError(
            f"{file}: corrupt checkpoint ({error}); delete {file.parent} to start anew"
        ) from error
    return state


def _moments(model: PeftModel, optimizer: Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
    """Adam's running means of the gradient and of its square, by factor (`AdamMoments`)."""
    moments = {}
    for name, weight in model.named_parameters():
        if (found := FACTOR.search(name)) and (state := optimizer.state.get(weight)):
            moments[f"{found[1]}.{found[2]}"] = (state["exp_avg"], state["exp_avg_sq"])
    return moments


def _base_sha256(folder: Path) -> str:
    """SHA-256 over the config and the weights of the base model."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _peft_model(model_folder: Path, recipe: LoraRecipe) -> PeftModel:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(recipe.seed)
    with quiet_loading():
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.alpha,
        target_modules=_targets(base, recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    with quiet_loading():
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model


def _targets(base: PreTrainedModel, names: Sequence[str]) -> str | list[str]:
    """What PEFT is told to adapt: `all-linear`, or ends of names of linear layers."""
    import torch

    if list(names) == ["all-linear"]:
        return "all-linear"
    linear = [name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)]
    unknown = [n for n in names if not any(f".{name}".endswith(f".{n}") for name in linear)]
    if unknown or not names:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise DataError(
            f"target_modules: {', '.join(map(repr, unknown)) or 'nothing'} is no linear layer of "
            f"the base model; use all-linear, or some of {', '.join(known)}"
        )
    return list(names)


def _schedule(examples: Sequence[Example], recipe: LoraRecipe) -> list[list[int]]:
    """Batches, epoch after epoch, until the budget of tokens is reached."""
    schedule: list[list[int]] = []
    tokens = epoch = 0
    while True:
        for batch in length_batches(examples, recipe.batch_tokens, seed=recipe.seed + epoch):
            schedule.append(batch)
            tokens += sum(len(examples[index].ids) for index in batch)
            if tokens >= recipe.train_tokens:
                return schedule
        epoch += 1


def _warmup_cosine(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _bfloat16(precision: str) -> bool:
    """Whether to compute in bfloat16; `auto` does where the CPU multiplies it natively."""
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
