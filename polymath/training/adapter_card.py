"""The README of an adapter: what it was trained on, under which licence, and what it gained."""

import math
from pathlib import Path

from polymath.training.recipe import ExpertReport

__all__ = ["adapter_card", "write_card"]


def write_card(folder: Path, report: ExpertReport, card: str) -> None:
    """Put `training.json` and `README.md` beside the adapter."""
    (folder / "training.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def adapter_card(
    name: str, report: ExpertReport, data: str, licence: str, attribution: str, command: str
) -> str:
    """Markdown with data, licence, attribution, recipe, loss before and after."""
    recipe = report.recipe
    before, after = report.loss_before, report.loss_after
    return f"""# {name}

LoRA adapter for {report.base_model}, trained by:

    {command}

| | |
|---|---|
| data | {data} ({report.rows} conversations, SHA-256 `{report.data_sha256[:16]}`) |
| licence of the data | {licence or "not given"} |
| attribution | {attribution or "not given"} |
| rank, alpha | {recipe.lora_rank}, {recipe.alpha:g} |
| target modules | {", ".join(recipe.target_modules)} |
| steps, tokens | {report.steps}, {report.tokens:,} |
| learning rate, seed | {recipe.learning_rate:g}, {recipe.seed} |

| {report.eval_rows} held-out conversations, {report.eval_tokens:,} answer tokens | loss (nats) \
| perplexity |
|---|---|---|
| base model alone | {before:.4f} | {math.exp(before):.3f} |
| with this adapter | {after:.4f} | {math.exp(after):.3f} |
"""
