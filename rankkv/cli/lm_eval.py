"""`rankkv lm-eval`: the command line of lm-evaluation-harness with the model `rankkv` registered."""

from __future__ import annotations

import sys

import typer

from ..utils.hub import require
from .common import reports_errors

#: All arguments go to the harness, --help included.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@reports_errors
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the model `rankkv`; all arguments are those of the harness."""
    require("lm_eval", 'pip install "rankkv[lm-eval]"', "lm-evaluation-harness")
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation.lm_eval import model as lm_eval_model  # noqa: F401  registers the model
    from ..evaluation.lm_eval.rows import shorten_harness_errors

    given = sys.argv
    try:
        sys.argv = ["rankkv lm-eval", *context.args]
        with shorten_harness_errors("one of these tasks"):
            cli_evaluate()
    finally:
        sys.argv = given
