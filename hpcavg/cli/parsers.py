"""The command line: parsers made from `OPTIONS`, and one-line errors. Light to import."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hpcavg
from hpcavg import algorithms, models
from hpcavg.config import components, recipes
from hpcavg.config.options import OPTIONS, Config
from hpcavg.config.section import Option, options_of
from hpcavg.config.sources import from_sources
from hpcavg.distributed.job_environment import check_sizes
from hpcavg.errors import InputError, UsageError, require_integer, require_number
from hpcavg.utils.text import printable

COMMANDS = {
    "train": "train a model (the default)",
    "info": "print where the ranks run and how means would be taken; takes the options of train",
    "report": "print the table of one or several runs and plot their curves",
    "job": "print a job script for Slurm or LSF",
    "paper": "carry out the papers' experiments, at sizes for two cores, and write what they say to each claim",
    "data": "make the files of a data set ready for training, check them, or make up files of its format",
}
DATASETS = {
    action: [name for name, actions in components.DATASETS.items() if action in actions]
    for action in ("prepare", "check", "synthesize")
}
"""The data sets of each action of ``data``."""
FORMATS = ("binary", "python")

LISTINGS: dict[str, Callable[[], str]] = {
    "--algorithm": algorithms.describe,
    "--config": recipes.describe,
    "--engine": lambda: components.describe(components.ENGINES),
    "--model": models.describe,
    "--task": lambda: components.describe(components.TASKS),
}
"""The options that print a list of their values if the value is ``help``."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, which is one line, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            if not unknown[0].startswith("-"):
                commands = ", ".join(COMMANDS)
                raise UsageError(
                    f"{printable(unknown[0])}: must be an option, or, as the first word, one of {commands}"
                )
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0][:100], flags, n=3)
            hint = f"near it: {', '.join(near)}" if near else "--help lists them"
            raise UsageError(f"{printable(unknown[0])}: no such option; {hint}")
        return known

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(known).items():
            if value == []:  # what some versions of argparse make of --k=--
                self.error(f"argument --{name.replace('_', '-')}: expected one argument")
        return known, unknown


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the subcommand and the arguments after it; without one it is ``train``."""
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], list(arguments[1:])
    return "train", list(arguments)


def wants_help(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask only for a text. A text needs no MPI."""
    asked = any(text in ("--help", "--version", "--list") or text.startswith("-h") for text in arguments)
    return asked or listing(arguments) is not None


def listing(arguments: Sequence[str]) -> str | None:
    """Return the list that an option with the value ``help`` asks for, otherwise None."""
    for text, following in itertools.pairwise([*arguments, ""]):
        flag, _, value = text.partition("=")
        if flag in LISTINGS and (value or following) == "help":
            return LISTINGS[flag]()
    return None


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of ``train``. Values stay strings: `Config` reads and checks them."""
    commands = "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="hpcavg",
        usage="python -m hpcavg [train|info|report|job|paper|data] [--config FILE.toml] [options]",
        description=f"Train a neural network by model averaging over MPI.\n\ncommands:\n{commands}",
        epilog="Options come from the defaults, then the TOML file, then the command line. There, the word unset as a\n"
        "value takes back what the file says, for options without a default.\n\n"
        "algorithms, with their options and defaults (M: the size of the model, P: the number of learners)\n"
        f"{algorithms.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"hpcavg {hpcavg.__version__}")
    text = "TOML file of options, such as the config.toml of a run, or a recipe of the papers; --config help lists them"
    parser.add_argument("--config", metavar="FILE", help=text)
    groups: dict[str, Any] = {}
    for option in OPTIONS.values():
        if option.title not in groups:
            groups[option.title] = parser.add_argument_group(option.title)
        if option.kinds == (bool,):
            groups[option.title].add_argument(option.flag, action=argparse.BooleanOptionalAction, help=_help(option))
        else:
            groups[option.title].add_argument(option.flag, metavar=_metavar(option.kinds[0]), help=_help(option))
    return parser


def _help(option: Option) -> str:
    """Return an option's text with its choices and its default."""
    text = option.help
    if option.flag in LISTINGS:
        text += f"; {option.flag} help lists them"
    elif option.choices:
        text += f": {', '.join(choice.replace('_', '-') for choice in option.choices)}"
    if option.default is not None:
        text += f" [{option.text(option.default).replace('_', '-')}]"
    return text


def parse_train(arguments: Sequence[str]) -> Config:
    """Return the configuration for the arguments of ``train`` or ``info``. Raises `InputError`."""
    options = vars(train_parser().parse_args(arguments))
    return from_sources(options.pop("config", None), options)


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of ``report``."""
    parser = _Parser(prog="hpcavg report", description=COMMANDS["report"], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run")
    parser.add_argument("--output", metavar="FILE.png", help="where the plot goes [DIR/curves.png of the first run]")
    return parser


def job_parser() -> argparse.ArgumentParser:
    """Return the parser of ``job``. It skips the options of ``train``; `write_job` checks values."""
    from hpcavg.cli import job  # only this command pays for it

    parser = _Parser(
        prog="hpcavg job",
        usage="python -m hpcavg job {slurm,lsf} [options] [options of train]",
        description="Print a job script that trains with the given options, as those in jobs/ do with the defaults.",
        allow_abbrev=False,
    )
    parser.add_argument("scheduler", metavar=_braced(job.LAUNCHERS))
    parser.add_argument("--script", type=Path, metavar="FILE", help="write it there, and beside it what it needs")
    for option in options_of("job", job.Job):
        parser.add_argument(
            option.flag,
            type=_number(int) if option.kinds == (int,) else str,
            default=option.default,
            metavar=_metavar(option.kinds[0]),
            help=option.help + ("" if option.default is None else f" [{option.default}]"),
        )
    return parser


def write_job(arguments: Sequence[str]) -> None:
    """Run the command ``job``. Raises `InputError`, also for options of ``train``."""
    from hpcavg.cli import job
    from hpcavg.machine.warnings import warn_of_learners

    known, options = job_parser().parse_known_args(arguments)
    script = known.__dict__.pop("script")
    _require_one_of("job", known.scheduler, job.LAUNCHERS)
    _require_one_of("--kind", known.kind, job.PURPOSES)
    wanted = job.Job(**vars(known))
    if wanted.kind != "benchmarks":  # whose options are the suite's
        config = parse_train([*options, "--output", wanted.output or "runs", "--resume", wanted.resume])
        num_ranks = wanted.nodes * wanted.ranks_per_node
        servers, per_rank = config.servers_of(num_ranks), config.learners_of_rank(num_ranks)
        check_sizes(num_ranks, config.roles.group_size, servers, per_rank)
        for text in warn_of_learners(config.run.intended_learners, per_rank * (num_ranks - servers)):
            print(f"hpcavg: warning: {text}", file=sys.stderr)
    job.write(wanted, options, script)


def paper_parser() -> argparse.ArgumentParser:
    """Return the parser of ``paper``. `parse_paper` checks values."""
    parser = _Parser(prog="hpcavg paper", description=COMMANDS["paper"], allow_abbrev=False)
    parser.add_argument(
        "names", nargs="*", default=(), metavar="NAME", help="experiments, or papers for all of theirs [all]"
    )
    parser.add_argument("--list", action="store_true", help="print the experiments")
    parser.add_argument("--seeds", type=_number(int), metavar="N", help="seeds of every arm [5, quick: 3]")
    text = "shrink everything to seconds: it shows that the experiments work, not what they find"
    parser.add_argument("--quick", action="store_true", help=text)
    text = "ranks that share the learners of a run; several runs go on side by side [1]"
    parser.add_argument("--ranks-per-run", type=_number(int), default=1, metavar="N", help=text)
    text = "folder of finished runs, which are not carried out again [runs/paper]"
    parser.add_argument("--cache", default="runs/paper", metavar="DIR", help=text)
    parser.add_argument("--page", metavar="FILE.md", help="write a page with tables and plots, which go beside it")
    text = (
        "the papers' size: write sweep files for jobs/ there, and collect the finished runs under it, also for the page"
    )
    parser.add_argument("--full", metavar="DIR", help=f"{text}; without --page nothing is run here")
    return parser


def parse_paper(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the checked arguments of ``paper``. Raises `InputError`."""
    options = paper_parser().parse_args(arguments)
    options.seeds = options.seeds if options.seeds is not None else 3 if options.quick else 5
    require_integer("seeds", options.seeds, 2, 1000)
    require_integer("ranks_per_run", options.ranks_per_run, 1)
    if options.page is not None and not options.page.endswith(".md"):
        raise InputError("page", options.page, "a name that ends with .md")
    from hpcavg.experiments import registry  # only this command pays for it

    registry.chosen(options.names)
    return options


def data_parser() -> argparse.ArgumentParser:
    """Return the parser of ``data``. `parse_data` checks values."""
    parser = _Parser(prog="hpcavg data", description=COMMANDS["data"], allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar=_braced(DATASETS))
    text = "convert published files to files that are quick to train from: epsilon on one rank, imagenet on all"
    prepare = actions.add_parser("prepare", help=text, description=text, allow_abbrev=False)
    prepare.add_argument("dataset", metavar=_braced(DATASETS["prepare"]))
    prepare.add_argument("--data-dir", required=True, metavar="DIR", help="folder of the files as published")
    prepare.add_argument("--output", metavar="DIR", help="where it goes [epsilon: DIR; imagenet: DIR/prepared]")
    prepare.add_argument(
        "--size", type=_number(int), metavar="N", help="pixels of an image's shorter side, for imagenet [256]"
    )
    text = "read every byte of what prepare has made and name the files that are damaged, on all ranks"
    check = actions.add_parser("check", help=text, description=text, allow_abbrev=False)
    check.add_argument("dataset", metavar=_braced(DATASETS["check"]))
    check.add_argument("--data-dir", required=True, metavar="DIR", help="folder that was prepared, or that above it")
    text = "write files of the same format with made-up content that can be learned"
    synthesize = actions.add_parser("synthesize", help=text, description=text, allow_abbrev=False)
    synthesize.add_argument("dataset", metavar=_braced(DATASETS["synthesize"]))
    synthesize.add_argument("--data-dir", required=True, metavar="DIR", help="folder to write to, without such files")
    scale = "samples as a part of the original's; at least a few of every class are written [0.01]"
    synthesize.add_argument("--scale", type=_number(float), default=0.01, metavar="X", help=scale)
    synthesize.add_argument("--seed", type=_number(int), default=0, metavar="N", help="seed of the content [0]")
    synthesize.add_argument("--format", metavar=_braced(FORMATS), help="version of cifar10's files [binary]")
    synthesize.add_argument("--compress", action="store_true", help="write epsilon's text as .bz2")
    return parser


def parse_data(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the checked arguments of ``data``. Raises `InputError`."""
    if arguments and not arguments[0].startswith("-"):
        _require_one_of("data", arguments[0], DATASETS)
    options = data_parser().parse_args(arguments)
    _require_one_of(f"data {options.action}", options.dataset, DATASETS[options.action])
    if options.data_dir == "":
        raise InputError("data_dir", "", "the name of a folder")
    foreign = {"size": "imagenet", "format": "cifar10", "compress": "epsilon"}
    for name, dataset in foreign.items():
        if getattr(options, name, None) and options.dataset != dataset:
            raise InputError(name, getattr(options, name), f"unset for {options.dataset}; it is for {dataset}")
    if options.action == "prepare":
        options.size = 256 if options.size is None else options.size
        require_integer("size", options.size, 16, 4096)
    if options.action == "synthesize":
        if options.format is not None:
            _require_one_of("--format", options.format, FORMATS)
        require_number("scale", options.scale, lambda scale: 0 < scale <= 1, "a number above 0 and at most 1")
        require_integer("seed", options.seed, 0, 2**63 - 1)
    return options


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a function that makes a number of a text, and returns other texts unchanged, for a later check."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return convert


def _require_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {printable(value)}: must be one of {', '.join(choices)}")


def _braced(choices: Iterable[str]) -> str:
    return f"{{{','.join(choices)}}}"


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "NAME"}.get(kind, "SHAPE")
