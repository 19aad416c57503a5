"""Files: read with errors that name them, written whole or not at all; new folders."""

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
    """Input that cannot be used: says the file and line, what was expected and what was found."""


class ModelError(ValueError):
    """A checkpoint, adapter or run that cannot be read exactly: file or key, what was expected and found."""


def expect_file(path, largest: int, error=DataError, links: bool = True) -> Path:
    """`path`, where it is a regular file of at most `largest` bytes: no pipe, which would never end.

    links=False, for what belongs to a checkpoint or a run: no link may lead out of the file's folder, but for
    those of the Hugging Face cache, snapshots/REVISION/NAME → blobs/HASH. Raises `error`.
    """
    path = Path(path)
    try:
        found = path.stat()
        real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as problem:  # links in a circle, a name with NUL or too long
        there = "nothing" if isinstance(problem, FileNotFoundError) else getattr(problem, "strerror", problem)
        raise error(f"{path}: expected a file, found {there}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise error(f"{path}: expected a file, found {kind}")
    if found.st_size > largest:
        raise error(f"{path}: expected at most {largest:,} bytes, found {found.st_size:,}")
    hub = [part.parent / "blobs" for part in folder.parents if part.name == "snapshots"]
    if not links and not any(home in real.parents for home in (folder, *hub)):
        raise error(f"{path}: expected a file of that folder, found a link to {real}")
    return path


def read_text(path: Path, largest: int = 1 << 30, error=DataError, links: bool = True) -> str:
    """A file's text without byte-order mark. Raises `error` as expect_file, and where it is not UTF-8."""
    try:
        return expect_file(path, largest, error, links).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: expected UTF-8 text, found {problem}") from None
    except OSError as problem:
        raise error(f"{path}: expected a file that can be read, found: {problem.strerror}") from None


def parse_json(text: str):
    """A JSON value. Raises ValueError where it is none, is nested deeper than DEEPEST, or has a key twice."""
    def object_of(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {twice!r} twice in {str(found)[:60]}")
        return found

    try:
        value = json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [part for each in level if isinstance(each, (dict, list))
                 for part in (each.values() if isinstance(each, dict) else each)]
    if level:  # it could be read, perhaps not be written again
        raise ValueError(f"more than {DEEPEST} levels")
    return value


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
    """A JSON object of a checkpoint or run; where there is no such file, `default` if given.

    Raises ModelError that names the file.
    """
    if not os.path.lexists(file):
        if default is None:
            raise ModelError(f"{file}: not found (a local folder is expected; nothing is downloaded)")
        return default
    try:
        value = parse_json(read_text(file, 1 << 26, ModelError, links=False))
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: expected JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def expect(found: dict, rules: dict, where, error=ModelError) -> None:
    """Raise `error` for the first key of `found` that is not as `rules` say: {key: (what is expected, test)}.

    A key that is absent is tested as None.
    """
    for key, (expected, test) in rules.items():
        if not test(found.get(key)):
            raise error(f"{where}: {key}: expected {expected}, found {repr(found.get(key))[:60]}")


def between(low, high, kind=int, optional: bool = False) -> tuple:
    """A rule for `expect`: a number from `low` to `high`, int or, with kind=float, either; never NaN."""
    kinds = (int, float) if kind is float else int

    def test(value):
        return (optional if value is None else
                isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high)

    return f"{'an integer' if kind is int else 'a number'} from {low:,} to {high:,}", test


COUNT = between(0, 10**9)


def either(*kinds, optional: bool = False) -> tuple:
    """A rule for `expect`: a value of one of these types."""
    return (" or ".join(kind.__name__ for kind in kinds),
            lambda value: optional if value is None else type(value) in kinds)


@contextmanager
def errors_name_path(path: Path):
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
def atomic_write(path: Path):
    """A path to write a file or a folder to, which becomes `path` when all of it is on the disk, or never.

    Nothing half-written stays, but for a process that was killed: path.part, which the next one writes over.
    """
    part = path.with_name(path.name + ".part")
    remove(part)
    try:
        with errors_name_path(path):
            yield part
            for file in (*part.rglob("*"), part):
                fsync(file)
            os.replace(part, path)
            fsync(path.parent)  # where its new name is
    except BaseException:
        remove(part)
        raise


@contextmanager
def remove_if_unused(folder: Path):
    """Delete a new folder again, where what goes wrong has left nothing but config.json in it."""
    try:
        yield
    except BaseException:
        if {path.name for path in folder.glob("*")} <= {"config.json"}:
            remove(folder)
        raise


def fsync(path: Path) -> None:
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
    tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError that names it."""
    with atomic_write(path) as part:
        # Half a surrogate pair loses no file.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


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
