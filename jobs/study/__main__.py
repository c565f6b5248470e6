"""A scaling study: many sizes, each trained to several budgets, measured, and fitted.

python -m jobs.study plan|run|status|fit|report STUDY.yaml
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jobs.study.file import OfStudy, load_study
from jobs.study.plan import Plan, print_plan
from jobs.study.points import Status, print_status
from jobs.study.run import Execute, execute
from pipeline.cli import errors_exit, parse_flags


@dataclass(frozen=True)
class Fit(OfStudy):
    """Fit the scaling laws to the measured points and print them with intervals."""


@dataclass(frozen=True)
class Report(OfStudy):
    """Fit and plot everything, write one HTML file and PNGs, and log them to the study's MLflow run."""

    out: str = ""
    """Folder to write to; default: report/ in the study's folder, or runs/NAME/report for a remote study."""


Command = Plan | Annotated[Execute, tyro.conf.subcommand("run")] | Status | Fit | Report


def main(argv: Sequence[str]) -> int:
    with errors_exit():
        options: Any = parse_flags(Command, argv, __doc__ or "")  # type: ignore[arg-type]
        match options:
            case Plan():
                print_plan(options)
            case Execute():
                return execute(options)
            case Status():
                print_status(options)
            case Fit() | Report():
                from jobs.study.report import write_report

                write_report(load_study(options.study), getattr(options, "out", None))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
