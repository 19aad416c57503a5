"""A script's frozen dataclass is configuration and command line: fields are options, comments the help."""

import argparse
import dataclasses
import inspect
import re
import signal
import sys
import types
import typing
from pathlib import Path

from lib import distributed
from lib.files import DataError, ModelError


def parse(config_class, arguments=None, positional: str | None = None):
    """Parse the command line into `config_class`. Raises SystemExit for --help and what is not understood.

    A comment line heads a group of options; bool fields become --x, or --no-x where they are true; choices
    with "off" have --no-x too; `positional` names a tuple field taken as arguments. A subclass's own options
    precede the inherited ones, but for the group "machine", which comes last. A field `given`, where there is
    one, becomes the names of the options that were typed.
    """
    usage = "%(prog)s " + f"[{positional} …] " * bool(positional) + "[--option VALUE …]"
    parser = argparse.ArgumentParser(
        usage=usage, description=config_class.__doc__, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100))
    fields = {option.name: option for option in dataclasses.fields(config_class)}
    group, groups = parser, {}
    source = "".join(inspect.getsource(c) for c in config_class.__mro__ if dataclasses.is_dataclass(c))
    for heading, name, text in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", source, re.MULTILINE):
        if heading:
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            group = groups[heading]
            continue
        option, flag = fields[name], name.replace("_", "-")
        choices = typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else None
        optional = isinstance(option.type, types.UnionType)  # T | None
        kind = str if choices else typing.get_args(option.type)[0] if optional else option.type
        shown = "" if option.default in (None, "", ()) else f" (default: {brief(option.default)})"
        settings = {"default": argparse.SUPPRESS, "help": (text + shown).replace("%", "%%")}
        if name == positional:
            parser.add_argument(name, nargs="*", type=Path, help=settings["help"])
        elif kind is bool:  # named by what it changes
            no = option.default
            group.add_argument("--" + "no-" * no + flag, dest=name, help="do not " * no + text,
                               default=argparse.SUPPRESS, action="store_false" if no else "store_true")
        else:
            metavar = None if choices else {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
            group.add_argument("--" + flag, type=kind, choices=choices, metavar=metavar, **settings)
            if choices and "off" in choices:
                group.add_argument("--no-" + flag, dest=name, action="store_const", const="off",
                                   default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser._action_groups.sort(key=lambda group: group.title == "machine")
    typed = vars(parser.parse_args(arguments))
    if positional in typed:
        typed[positional] = tuple(typed[positional])
    return config_class(**typed, **({"given": tuple(typed)} if "given" in fields else {}))


def option_value(option: dataclasses.Field, value, where):
    """A value for an option from a run's config.json. Raises DataError where it is not of its type."""
    kinds = typing.get_args(option.type) or (option.type,)  # of a Literal: its choices
    if typing.get_origin(option.type) is typing.Literal:
        valid = value in kinds
    else:
        stored = {Path: str, float: (int, float)}.get(kinds[0], kinds[0])
        valid = value is None and types.NoneType in kinds or isinstance(value, stored) and (
            kinds[0] is bool or not isinstance(value, bool))
    if not valid:
        expected = " or ".join(str(getattr(kind, "__name__", kind)) for kind in kinds)
        raise DataError(f"{where}: {option.name}: expected {expected}, found {repr(value)[:60]}")
    return Path(value) if kinds[0] is Path and value is not None else value


def as_typed(options: dict, config_class) -> str:
    """Options as one would type them, without those that are the default; on one line."""
    return printable(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()
                              if value != getattr(config_class, name)))


def brief(value):
    """A default as --help shows it: paths inside the project relative to it."""
    root = Path(__file__).parent.parent
    return value.relative_to(root) if isinstance(value, Path) and value.is_relative_to(root) else value


def run(main, config_class, positional: str | None = None) -> None:
    """Parse the command line and call `main` with it. Wrong input ends the script with one line."""
    sys.stdout.reconfigure(errors="replace")  # a console that has no β still gets its help
    if distributed.launched() and Path(sys.argv[0]).name not in ("train.py", "evaluate.py"):
        sys.exit(f"error: expected one process for {sys.argv[0]}: "
                 f"only train.py and evaluate.py share their work")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt, as Ctrl-C is
    try:
        main(parse(config_class, positional=positional))
    except (DataError, ModelError, OSError, FloatingPointError) as error:
        sys.exit(with_notes(f"error: {error}", error))
    except KeyboardInterrupt as error:
        sys.exit(with_notes("interrupted: verdicts and kept reference stay", error))
    finally:
        sys.stderr = sys.__stderr__  # silent processes speak up when they fail
    distributed.destroy()


def with_notes(text: str, error: BaseException) -> str:
    """What is said of an error, and on lines of their own the notes that were added to it."""
    return "\n".join([text, *getattr(error, "__notes__", ())])


def require(config, *checks: tuple) -> None:
    """Raise DataError for the first (field, valid, expected) that is not valid."""
    for name, valid, expected in checks:
        if not valid:
            raise DataError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(config, name)}")


def comma_list(text: str | None) -> list[str]:
    """"a, b" → ["a", "b"]; nothing, or "none", → []."""
    return [item.strip() for item in (text or "").split(",") if item.strip() not in ("", "none")]


def markdown(lines: list, width: int) -> str:
    """A Markdown table of lines of cells, the first its head; what is wider than `width` comes in parts."""
    widths, parts = [max(map(len, column)) for column in zip(*lines)], [[0]]
    for i in range(1, len(widths)):
        if parts[-1] != [0] and sum(widths[j] + 3 for j in [*parts[-1], i]) + 1 > width:
            parts.append([0])
        parts[-1].append(i)
    lines = [lines[0], ["-" * n for n in widths], *lines[1:]]
    rows = [[" | ".join(line[i].ljust(widths[i]) for i in part) for line in lines] for part in parts]
    return "\n\n".join("\n".join(f"| {row} |" for row in part) for part in rows)


def printable(text: str) -> str:
    """A stranger's text on one line, without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def shown(value: float | int) -> str:
    """A rate with three decimals, a count as it is."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
