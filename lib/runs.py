"""A finished run's folder, read back for a comparison: every value is checked before anything is counted."""

from collections import Counter, defaultdict
from pathlib import Path

from lib.files import COUNT, DataError, between, either, expect, json_lines, read_json, read_text
from lib.report import figures

KINDS = ("harmful", "attacked", "over_refusal", "task")
TEXT, TRUTH = either(str), either(bool)
CONFIG = {"seed": between(0, 2**32), "temperature": between(1e-6, 1e6, float), "max_new_tokens": COUNT}
ROW = {"kind": (" | ".join(KINDS), lambda value: value in KINDS), "set": TEXT, "decoding": TEXT,
       "group": TEXT, "prompt": TEXT, "thought": TEXT, "response": TEXT, "cut": TRUTH}


def read_run(path: Path) -> tuple[Path, dict, dict]:
    """(path, config.json, results.json) of a run. Raises DataError or ModelError that names the file."""
    config, file = read_json(path / "config.json"), path / "results.json"
    results = read_json(file)
    expect(config, CONFIG, path / "config.json", DataError)
    for which in {"after", *results} & {"base", "after"}:
        try:
            for title, figure in figures(results[which]).items():
                expect(figure, {"rate": between(0, 1, float)}, f"{which}: {title}", DataError)
        except Exception as error:  # of any form that JSON has
            raise DataError(f"{file}: expected results of train.py, found {type(error).__name__}: "
                            f"{str(error)[:200]}") from None
    return path, config, results


def read_completions(path: Path, which: str) -> list[dict]:
    """The rows of a run's completions, `which` base or after. Raises DataError that names file and line."""
    file = path / f"completions_{which}.jsonl"
    rows, counts = [], defaultdict(Counter)
    for line, row in json_lines(read_text(file, links=False), file):
        if not isinstance(row, dict):
            raise DataError(f"{file}:{line}: expected an object, found {repr(row)[:60]}")
        scores = {"correct": TRUTH} if row.get("kind") == "task" else {"refused": TRUTH}
        if "harmful" in row:
            scores |= {"harmful": TRUTH, "score": between(1, 5, float, optional=True)}
        scores |= {"garbled": TRUTH} if "garbled" in row else {}
        expect({"score": "none"} | row, ROW | scores, f"{file}:{line}", DataError)
        counts[row["kind"], row["set"], "harmful" in row][row["decoding"]] += 1
        rows.append(row)
    names = Counter((kind, name) for kind, name, _ in counts)
    for (kind, name, _), found in counts.items():
        if len(set(found.values())) > 1 or next(iter(found)) != "greedy" or names[kind, name] > 1:
            raise DataError(f"{file}: expected each prompt of {name} as often, greedy first, judged all or "
                            f"none, found {dict(found)}")
    return rows
