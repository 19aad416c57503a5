"""Files: read with errors that name them, written whole or not at all; new folders."""

import json
import os
from dataclasses import fields
from pathlib import Path


class DataError(ValueError):
    """Input that cannot be used: says the file and line, what was expected and what was found."""


class ModelError(ValueError):
    """A checkpoint, adapter or run that cannot be read exactly: file or key, what was expected and found."""


def read_text(path: Path) -> str:
    """A file's text without byte-order mark. Raises DataError where there is no file, or it is not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found {error}") from None


def parse_json(text: str):
    """A JSON value. Raises ValueError where it is none, and for a key that an object has twice."""
    def object_of(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
        return found

    return json.loads(text, object_pairs_hook=object_of)


def json_lines(text: str, path: Path):
    """(line number, value) of each line of JSON Lines that is not blank. Raises DataError naming the line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: expected a JSON object, "
                                f"found {line[:60]!r} ({error})") from None


def read_json(file: Path, default=None) -> dict:
    """A JSON object; where the file is absent, `default` if given. Raises ModelError that names the file."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if default is None:
            raise ModelError(f"{file}: not found (a local folder is expected; "
                             f"nothing is downloaded)") from None
        return default
    except ValueError as error:
        raise ModelError(f"{file}: expected JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair loses no file
    os.replace(part, path)


def write_json(path: Path, value) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(path: Path, config) -> None:
    """A script's options, a dataclass, as JSON."""
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "given"}
    write_text(path, json.dumps(options, indent=2, default=str) + "\n")  # paths as text


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a JSON Lines file."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def new_folder(out: Path | None, default: str) -> Path:
    """`out`, which must not exist (nothing is ever written over), or the first free of default, default-2, …

    Raises DataError for an `out` that exists.
    """
    if out and out.exists():
        raise DataError(f"--out: expected a folder that does not exist, found {out}")
    numbered = (Path(default + f"-{i}" * (i > 1)) for i in range(1, 10**6))
    return out or next(path for path in numbered if not path.exists())
