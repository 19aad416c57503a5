"""A script's frozen dataclass is configuration and command line: fields are options, comments the help."""

import argparse
import dataclasses
import inspect
import re
import signal
import sys
import typing
from pathlib import Path

from tqdm import tqdm

from lib import distributed
from lib.files import DataError

ROOT = Path(__file__).parent.parent
METAVARS = {int: "N", float: "X", Path: "PATH"}


def parse(config_class, arguments=None, positional: str | None = None):
    """Parse the command line into `config_class`. Raises SystemExit for --help and wrong options.

    A comment line heads a group of options, the comment behind a field is its help. A bool field becomes
    --x and --no-x. `positional` names a tuple field for the arguments without an option. A field `given`
    gets the names of the options that were typed.
    """
    usage = "%(prog)s " + f"[{positional} …] " * bool(positional) + "[--option VALUE …]"
    parser = argparse.ArgumentParser(
        usage=usage, description=config_class.__doc__, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100))
    fields = {option.name: option for option in dataclasses.fields(config_class)}
    classes = [c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]  # a class before its parents
    source = "".join(inspect.getsource(c) for c in classes)
    groups = {}
    group = parser
    for heading, name, text in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", source, re.MULTILINE):
        if heading:
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            group = groups[heading]
        elif name == positional:
            parser.add_argument(name, nargs="*", type=Path, default=argparse.SUPPRESS, help=text)
        else:
            add_option(group, fields[name], text)
    parser._action_groups.sort(key=lambda group: group.title == "machine")  # last
    typed = vars(parser.parse_args(arguments))
    if positional in typed:
        typed[positional] = tuple(typed[positional])
    if "given" in fields:
        typed["given"] = tuple(typed)
    return config_class(**typed)


def add_option(group, option: dataclasses.Field, text: str) -> None:
    """Add a field to a group of the parser as --option, with its default in the help."""
    default = option.default
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        default = default.relative_to(ROOT)
    if default not in (None, "", ()):
        text += f" (default: {default})"
    settings = {"dest": option.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    kinds = typing.get_args(option.type)
    if option.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(option.type) is typing.Literal:
        settings["choices"] = kinds
    else:
        kind = kinds[0] if kinds else option.type  # of T | None: T
        settings |= {"type": kind, "metavar": METAVARS.get(kind, "TEXT")}
    group.add_argument("--" + option.name.replace("_", "-"), **settings)


def option_value(option: dataclasses.Field, value, file):
    """Return a value of a run's config.json for an option. Raises DataError for another type."""
    kinds = typing.get_args(option.type) or (option.type,)  # the values of a Literal, or types
    stored_as = [str if kind is Path else kind for kind in kinds] + [int] * (float in kinds)
    if value not in kinds and type(value) not in stored_as:
        expected = " or ".join(str(getattr(kind, "__name__", kind)) for kind in kinds)
        raise DataError(f"{file}: {option.name}: expected {expected}, found {repr(value)[:60]}")
    return Path(value) if Path in kinds and value is not None else value


def as_typed(options: dict, config_class) -> str:
    """Return options as one would type them, on one line, without those that are the default."""
    typed = []
    for name, value in options.items():
        if value != getattr(config_class, name):
            name = name.replace("_", "-")
            typed.append({True: f"--{name}", False: f"--no-{name}"}.get(value, f"--{name} {value}"))
    return printable(" ".join(typed))


def run(main, config_class, positional: str | None = None) -> None:
    """Parse the command line and call `main` with it. Wrong input ends the script with one line."""
    sys.stdout.reconfigure(errors="replace")  # some consoles have no β
    if distributed.launched() and Path(sys.argv[0]).name not in ("train.py", "evaluate.py"):
        sys.exit(f"error: expected one process for {sys.argv[0]}: only train.py and evaluate.py run in several")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt, as Ctrl-C is
    try:
        main(parse(config_class, positional=positional))
    except (DataError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        sys.exit("\n".join([message, *getattr(error, "__notes__", ())]))
    finally:
        sys.stderr = sys.__stderr__  # silent processes show their error
    distributed.destroy()


def progress_bar(*args, **options) -> tqdm:
    """Return tqdm's bar, which writes twice a second to a terminal and once a minute to a file."""
    seconds = 0.5 if sys.stderr.isatty() else 60.0
    return tqdm(*args, mininterval=seconds, maxinterval=max(10.0, seconds), **options)


def require(config, *checks: tuple) -> None:
    """Raise DataError for the first (field, valid, expected) that is not valid."""
    for name, valid, expected in checks:
        if not valid:
            raise DataError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(config, name)}")


def comma_list(text: str | None) -> list[str]:
    """Return the items of "a, b"; [] for nothing and for "none"."""
    items = [item.strip() for item in (text or "").split(",")]
    return [item for item in items if item not in ("", "none")]


def printable(text: str) -> str:
    """Return a stranger's text on one line, without characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
