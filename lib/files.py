"""Read and write files. Errors name the file; writes are atomic."""

import itertools
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class DataError(ValueError):
    """Input that cannot be used. The message names file and line, what was expected and what was found."""


class ModelError(DataError):
    """A checkpoint, adapter or run that cannot be read. The message names the file or key."""


def expect_file(path) -> Path:
    """Return `path` if it is a file. Raises DataError."""
    if not os.path.isfile(path):
        found = "something else" if os.path.exists(path) else "nothing"
        raise DataError(f"{path}: expected a file, found {found}")
    return Path(path)


def read_text(path) -> str:
    """Return a UTF-8 file's text without byte-order mark. Raises DataError."""
    try:
        return expect_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found {error}; if it is text, save it as "
                        f"UTF-8: iconv -f LATIN1 -t UTF-8 OLD > NEW") from None


def unique_keys(pairs: list) -> dict:
    """Return a JSON object. Raises ValueError for a key that it has twice: which value counts is open."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)[:60]!r} twice")
    return value


def parse_json(text: str):
    """Parse JSON. Raises ValueError, also for too many levels and for a key that comes twice."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("too many levels of lists and objects") from None


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


def read_rows(path: Path):
    """Yield ("file:line", object) for each line of a JSON Lines file. Raises DataError naming the line."""
    for number, row in json_lines(read_text(path), path):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object, found {str(row)[:60]}")
        yield f"{path}:{number}", row


def read_json(file: Path, default=None) -> dict:
    """Read a JSON object of a checkpoint or run, or return `default` for no file. Raises ModelError."""
    if not os.path.lexists(file):
        if default is None:
            raise ModelError(f"{file}: not found (a local folder is expected; nothing is downloaded)")
        return default
    text = read_text(file)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ModelError(f"{file}: expected JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def expect(values: dict, rules: dict, where) -> None:
    """Check values by rules {key: (description, test)}; an absent key is None. Raises ModelError."""
    for key, (description, test) in rules.items():
        if not test(values.get(key)):
            raise ModelError(f"{where}: {key}: expected {description}, found {repr(values.get(key))[:60]}")


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
    except (SafetensorError, RuntimeError) as error:  # of safetensors; of torch.save
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def atomic_write(path: Path):
    """Yield a path for a file or folder, which becomes `path` once all of it is written, or is deleted.

    A process that was killed leaves path.part, which the next call deletes.
    """
    part = path.with_name(path.name + ".part")
    remove(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with errors_name_path(path):
            yield part
            os.replace(part, path)
    except BaseException:
        remove(part)
        raise


@contextmanager
def remove_if_unused(folder: Path):
    """Delete a new folder if an error leaves it unused."""
    try:
        yield
    except BaseException:
        if is_unused(folder):
            remove(folder)
        raise


def is_unused(folder: Path) -> bool:
    """Return whether this is a folder that holds nothing, or config.json alone: no stage has finished."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {"config.json"}


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OSError that names it."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair


def write_json(path: Path, value) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(path: Path, config, **facts) -> None:
    """Write a script's options, a dataclass, and further facts as JSON. Paths become text."""
    options = {name: value for name, value in vars(config).items() if name not in ("given", "resume")}
    write_text(path, json.dumps(options | facts, indent=2, default=str) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a JSON Lines file."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def new_folder(out: Path | None, default: str) -> Path:
    """Make the folder `out`, or the first of default, default-2, … that does not exist.

    Raises DataError for an `out` that exists: nothing is written over.
    """
    for number in itertools.count(1):
        path = out or Path(default + f"-{number}" * (number > 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
            return path
        except FileExistsError:
            if out:
                raise DataError(f"--out: expected a folder that does not exist, found {out} (type another; "
                                "train.py --resume continues an interrupted run)") from None
