"""Files: read with errors that name them, written whole or not at all; new folders."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError


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


@contextmanager
def naming(path: Path):
    """What goes wrong in writing, a full disk for one, as an OSError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def written_whole(path: Path):
    """A path to write a file or a folder to, which becomes `path` when all of it is on the disk, or never.

    Nothing half-written stays, but for a process that was killed: path.part, which the next one writes over.
    """
    part = path.with_name(path.name + ".part")
    remove(part)
    try:
        with naming(path):
            yield part
            for file in (*part.rglob("*"), part):
                sync(file)
            os.replace(part, path)
            sync(path.parent)  # where its new name is
    except BaseException:
        remove(part)
        raise


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    if os.name == "posix":  # Windows opens no folder, and syncs nothing that is open for reading
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def expect_writable(path: Path) -> None:
    """Make the folder of a file that is written after hours, and try it now. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError that names it."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair loses no file


def write_json(path: Path, value) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(path: Path, config, **facts) -> None:
    """A script's options, a dataclass, as JSON; `facts` beside them: what is no option."""
    options = {field.name: getattr(config, field.name) for field in fields(config)
               if field.name not in ("given", "resume")}
    write_text(path, json.dumps(options | facts, indent=2, default=str) + "\n")  # paths as text


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a JSON Lines file."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def new_folder(out: Path | None, default: str) -> Path:
    """Make `out`, which must not exist (nothing is ever written over), or the first of default, default-2, …

    Of two processes at a time each gets another one. Raises DataError for an `out` that exists.
    """
    for number in range(1, 10**6):
        path = out or Path(default + f"-{number}" * (number > 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
            return path
        except FileExistsError:
            if out:
                raise DataError(f"--out: expected a folder that does not exist, found {out}") from None
