"""`polymath`: the commands and what they print when something is wrong."""

import sys

import typer

from polymath import __version__
from polymath.cli import ask, configuration, evaluate, feedback, keys, serve, train
from polymath.errors import ConfigError, PolymathError

__all__ = ["app", "main"]

EXIT_BAD_INPUT = 2

app = typer.Typer(
    help="One OpenAI-compatible chat endpoint over a mixture of domain experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(ask.chat)
app.command()(ask.route)
app.command()(configuration.check)
app.command()(configuration.schema)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(configuration.experts_app, name="experts")
app.add_typer(keys.app, name="keys")
app.add_typer(feedback.app, name="feedback")


@app.callback(invoke_without_command=True)
def version_option(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        typer.echo(f"polymath {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; bad input ends with exit code 2 and one line per problem."""
    try:
        app()
    except ConfigError as error:
        _fail(error.problems)
    except PolymathError as error:
        _fail([error.message])
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(problems: tuple[str, ...] | list[str]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
