"""Read and write files. Errors name the file; writes are atomic."""

import json
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError

DEEPEST = 100  # levels of lists and objects in a JSON file


class DataError(ValueError):
    """Input that cannot be used. The message names file and line, what was expected and what was found."""


class ModelError(ValueError):
    """A checkpoint, adapter or run that cannot be read. The message names the file or key."""


def expect_file(path, largest: int, error=DataError, links: bool = True) -> Path:
    """Return `path` if it is a regular file of at most `largest` bytes. Raises `error`.

    links=False, for files of a checkpoint or a run: a link must not lead out of the file's folder, except
    into the blobs of the Hugging Face cache (snapshots/REVISION/NAME → blobs/HASH).
    """
    path = Path(path)
    try:
        status = path.stat()
        target, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    except FileNotFoundError:
        raise error(f"{path}: expected a file, found nothing") from None
    except (OSError, ValueError, RuntimeError) as problem:  # links in a circle, a name with NUL or too long
        raise error(f"{path}: expected a file, found {getattr(problem, 'strerror', problem)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise error(f"{path}: expected a file, found {kind}")
    if status.st_size > largest:
        raise error(f"{path}: expected at most {largest:,} bytes, found {status.st_size:,}")
    allowed = {folder}
    allowed.update(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")
    if not links and allowed.isdisjoint(target.parents):
        raise error(f"{path}: expected a file of that folder, found a link to {target}")
    return path


def read_text(path: Path, largest: int = 1 << 30, error=DataError, links: bool = True) -> str:
    """Return a UTF-8 file's text without byte-order mark. Raises `error`, also as expect_file does."""
    try:
        return expect_file(path, largest, error, links).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: expected UTF-8 text, found {problem}") from None
    except OSError as problem:
        raise error(f"{path}: expected a file that can be read, found: {problem.strerror}") from None


def _unique_keys(pairs: list) -> dict:
    """Return a JSON object. Raises ValueError for a key that it has twice."""
    value = {}
    for key, part in pairs:
        if key in value:
            raise ValueError(f"the key {key[:60]!r} twice")
        value[key] = part
    return value


def parse_json(text: str):
    """Parse JSON. Raises ValueError, also for more than DEEPEST levels and for a key that comes twice."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        parts = []
        for part in level:
            if isinstance(part, dict):
                parts.extend(part.values())
            elif isinstance(part, list):
                parts.extend(part)
        level = parts
    if level:  # Python could read it, but perhaps not write it again
        raise ValueError(f"more than {DEEPEST} levels")
    return value


def json_lines(text: str, path: Path):
    """Yield (line number, value) for each line that is not blank. Raises DataError naming the line."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: expected a JSON object, found {line[:60]!r} "
                            f"({error})") from None


def read_json(file: Path, default=None) -> dict:
    """Read a JSON object of a checkpoint or run, or return `default` for no file. Raises ModelError."""
    if not os.path.lexists(file):
        if default is None:
            raise ModelError(f"{file}: not found (a local folder is expected; nothing is downloaded)")
        return default
    text = read_text(file, 1 << 26, ModelError, links=False)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ModelError(f"{file}: expected JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def expect(values: dict, rules: dict, where, error=ModelError) -> None:
    """Check values by rules {key: (description, test)}; an absent key is tested as None. Raises `error`."""
    for key, (description, test) in rules.items():
        if not test(values.get(key)):
            raise error(f"{where}: {key}: expected {description}, found {repr(values.get(key))[:60]}")


def between(low, high, kind=int, optional: bool = False) -> tuple:
    """Return a rule for `expect`: an int from `low` to `high`, or with kind=float any number; never NaN."""
    types = (int,) if kind is int else (int, float)

    def test(value):
        if value is None:
            return optional
        return type(value) in types and low <= value <= high

    return f"{'an integer' if kind is int else 'a number'} from {low:,} to {high:,}", test


COUNT = between(0, 10**9)


def either(*types, optional: bool = False) -> tuple:
    """Return a rule for `expect`: a value of one of these types."""
    names = " or ".join(kind.__name__ for kind in types)
    return names, lambda value: optional if value is None else type(value) in types


@contextmanager
def errors_name_path(path: Path):
    """Raise an error of writing, such as a full disk, as an OSError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def atomic_write(path: Path):
    """Yield a path for a file or folder, which becomes `path` once all of it is on the disk, or is deleted.

    A process that was killed leaves path.part, which the next call deletes.
    """
    part = path.with_name(path.name + ".part")
    remove(part)
    try:
        with errors_name_path(path):
            yield part
            for file in (*part.rglob("*"), part):
                fsync(file)
            os.replace(part, path)
            fsync(path.parent)  # the folder holds the new name
    except BaseException:
        remove(part)
        raise


@contextmanager
def remove_if_unused(folder: Path):
    """Delete a new folder if an error leaves nothing in it, or config.json alone."""
    try:
        yield
    except BaseException:
        if {path.name for path in folder.glob("*")} <= {"config.json"}:
            remove(folder)
        raise


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix":  # Windows opens no folders
        return
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
    """Make a file's folder and check that it can be written to. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OSError that names it."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair


def write_json(path: Path, value) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(path: Path, config, **facts) -> None:
    """Write a script's options, a dataclass, and further facts as JSON. Paths become text."""
    options = {field.name: getattr(config, field.name) for field in fields(config)
               if field.name not in ("given", "resume")}
    write_text(path, json.dumps(options | facts, indent=2, default=str) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a JSON Lines file."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def new_folder(out: Path | None, default: str) -> Path:
    """Make the folder `out`, or the first of default, default-2, … that does not exist.

    Raises DataError for an `out` that exists: nothing is written over.
    """
    number = 1
    while True:
        path = out or Path(default + f"-{number}" * (number > 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
            return path
        except FileExistsError:
            if out:
                raise DataError(f"--out: expected a folder that does not exist, found {out}") from None
        number += 1
