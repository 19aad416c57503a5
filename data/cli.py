"""One frozen dataclass per script is both its configuration and its command line: a field is an option, its comment the help text."""

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path

from data import DataError, ranks
from data.checkpoint import ModelError


def parse(config_class, arguments=None, positional: str | None = None):
    """Parse the command line into `config_class`. A comment line heads a group of options; bool fields become --x/--no-x; `positional`
    names a tuple field taken as arguments. A subclass's own options are shown before the inherited ones."""
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    fields = {option.name: option for option in dataclasses.fields(config_class)}
    group, source = parser, "".join(inspect.getsource(c) for c in config_class.__mro__ if dataclasses.is_dataclass(c))
    for heading, name, text in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", source, re.MULTILINE):
        if heading:
            group = parser.add_argument_group(heading)
            continue
        option = fields[name]
        choices = typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else None
        optional = isinstance(option.type, types.UnionType)  # T | None
        kind = str if choices else typing.get_args(option.type)[0] if optional else option.type
        shown = "" if option.default in (None, "", ()) else f" (default: {option.default})"
        settings = {"default": option.default, "help": (text + shown).replace("%", "%%")}
        if name == positional:
            parser.add_argument(name, nargs="*", type=Path, help=settings["help"])
        elif kind is bool:
            group.add_argument("--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, **settings)
        else:
            group.add_argument("--" + name.replace("_", "-"), type=kind, choices=choices, **settings)
    return config_class(**vars(parser.parse_args(arguments)))


def run(main, config_class, positional: str | None = None) -> None:
    """Parse the command line and call `main` with it. What is wrong with the input or the machine ends the script with one line."""
    sys.stdout.reconfigure(errors="replace")  # a console that has no β still gets its help
    if ranks.started() and Path(sys.argv[0]).name not in ("train.py", "evaluate.py"):
        sys.exit(f"error: expected one process for {sys.argv[0]}: only train.py and evaluate.py share their work among several")
    try:
        main(parse(config_class, positional=positional))
    except (DataError, ModelError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: an unfinished run has no model and no results.json; a judge's verdicts and the cached reference are kept")
    finally:
        sys.stderr = sys.__stderr__  # silent processes speak up when they fail
    ranks.leave()


def require(config, *checks: tuple) -> None:
    """Raise DataError for the first (field, valid, expected) that is not valid."""
    for name, valid, expected in checks:
        if not valid:
            raise DataError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(config, name)}")


def comma_list(text: str | None) -> list[str]:
    """"a, b" → ["a", "b"]; nothing, or "none", → []."""
    return [item.strip() for item in (text or "").split(",") if item.strip() not in ("", "none")]


def new_folder(out: Path | None, default: str) -> Path:
    """`out`, which must not exist (nothing is ever overwritten), or the first of default, default-2, … that does not."""
    if out and out.exists():
        raise DataError(f"--out: expected a folder that does not exist, found {out}")
    return out or next(path for i in range(1, 10**6) if not (path := Path(default + f"-{i}" * (i > 1))).exists())
