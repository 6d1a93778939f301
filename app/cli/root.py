"""The command tree, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

from app.cli import ask, bench, cache, certify, doctor, estimate, evaluate, guard, ingest, precompute, search, serve
from app.cli.options import help_alone
from app.cli.output import note

DEBUG_VARIABLE = "RAGBLEND_DEBUG"


class _Root(TyperGroup):
    """Every failure is one line: exit code 2 for wrong usage, 130 for Ctrl-C, 1 for anything else."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        # Not a setting, and the settings refuse what they do not know.
        debug = os.environ.pop(DEBUG_VARIABLE, "") not in ("", "0")
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except TyperException as e:
            if not standalone_mode:
                raise
            show = getattr(e, "format_message", None)
            code = _fail(show() if show else str(e), getattr(e, "exit_code", 1))
        except (KeyboardInterrupt, Abort):
            code = _fail("interrupted", 130)
        except Exception as e:
            if debug:
                traceback.print_exc()
            code = _fail(_say(e), 1)
        finally:
            if debug:
                os.environ[DEBUG_VARIABLE] = "1"
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    name="ragblend",
    cls=_Root,
    help="RAG serving that reuses the precomputed KV cache of retrieved chunks inside stock vLLM.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"ragblend {version_of('ragblend')}")
        raise typer.Exit
    help_alone(context)


serve.add_to(app)
ingest.add_to(app)
estimate.add_to(app)
precompute.add_to(app)
ask.add_to(app)
search.add_to(app)
cache.add_to(app)
guard.add_to(app)
certify.add_to(app)
evaluate.add_to(app)
bench.add_to(app)
doctor.add_to(app)


def main() -> None:
    """Entry point of the ``ragblend`` command."""
    app()


def _say(error: BaseException) -> str:
    """The error's own words; where it has none (a bare AssertionError), its kind."""
    words = " ".join(str(error).split())
    if isinstance(error, OSError | KeyError | NotImplementedError) or not words:
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words


def _fail(message: str, code: int) -> int:
    note(f"ragblend: {' '.join(message.split())}")
    return code
