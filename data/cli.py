"""One frozen dataclass per script is both its configuration and its command line: a field is an option, its comment the help text."""

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path

from data import DataError
from data.checkpoint import ModelError


def parse(config_class, arguments=None, positional: str | None = None):
    """Parse the command line into `config_class`. bool fields become --x/--no-x; `positional` names a tuple field taken as arguments."""
    source = "".join(inspect.getsource(c) for c in reversed(config_class.__mro__) if dataclasses.is_dataclass(c))
    comments = dict(re.findall(r"^ +(\w+):.*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    for option in dataclasses.fields(config_class):
        choices = typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else None
        optional = isinstance(option.type, types.UnionType)  # T | None
        kind = str if choices else typing.get_args(option.type)[0] if optional else option.type
        shown = "" if option.default is None else f" (default: {option.default})"
        settings = {"default": option.default, "help": (comments.get(option.name, "") + shown).replace("%", "%%")}
        if option.name == positional:
            parser.add_argument(option.name, nargs="*", type=Path, help=settings["help"])
        elif kind is bool:
            parser.add_argument("--" + option.name.replace("_", "-"), action=argparse.BooleanOptionalAction, **settings)
        else:
            parser.add_argument("--" + option.name.replace("_", "-"), type=kind, choices=choices, **settings)
    return config_class(**vars(parser.parse_args(arguments)))


def run(main, config_class, positional: str | None = None) -> None:
    """Parse the command line and call `main` with it; an error in the user's input ends the script with one line that says what it is."""
    try:
        main(parse(config_class, positional=positional))
    except (DataError, ModelError, FileExistsError) as error:
        sys.exit(f"error: {error}")
