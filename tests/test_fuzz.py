"""Each hostile file works, or ends in one DataError or ModelError that names the file, within limits on processor time and memory.

Cases run in a worker, which the test starts again after a case that hangs or dies. To run one case alone and look at its files:
`python tests/test_fuzz.py FOLDER records 17 alone`, which deletes FOLDER first.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from fuzz_files import mutate, prepare
from fuzz_named import NAMED

CASES = {"records": 300, "risks": 100, "model": 200, "tokenizer": 120, "template": 80, "probe": 80,
         "run": 100, "resume": 120, "named": len(NAMED)}
ALL = [[kind, seed] for kind, n in CASES.items() for seed in range(n)]
SECONDS, GIGABYTES = 5, 2  # processor time of a case; memory in addition to the imports
RENDERINGS = 12  # more than a case has: each may take its limit of processor time
PATIENCE = 120  # seconds that a case may wait: far more than needed, so that a busy machine fails no case


class Constant(random.Random):
    """A generator without chance: a named case changes the first of the sound files."""

    random, choice = (lambda self: 0.99), (lambda self, values: values[0])


def run_case(folder: Path, kind: str, seed: int, kinds: dict) -> str:
    """Write the files of a case and read them. Returns what is wrong with the outcome, or ""."""
    from lib import template

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ""
    if kind == "named":
        kind, change, words = NAMED[seed]
        kinds[kind][0](folder, Constant())
        change(folder)
    else:
        rng = random.Random(f"{kind} {seed}")
        for file in kinds[kind][0](folder, rng):
            mutate(file, rng)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # of template processes that reached a limit
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # counts processor time, then ends this worker
    signal.alarm(PATIENCE)
    wrong = f"accepted, expected {words!r}" if words else ""
    try:
        kinds[kind][1](folder)
    except Exception as error:
        wrong, text = "", str(error)
        if type(error).__name__ not in ("DataError", "ModelError") or str(folder) not in text or len(text) > 5000:
            wrong = f"{type(error).__name__}: {text[:300]}" + " ".join(traceback.format_exc().splitlines()[-3:-1])
        elif words not in text:
            wrong = f"expected {words!r}, found {text[:300]!r}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"its child processes took {seconds:.1f} s" if seconds > RENDERINGS * template.SECONDS else wrong


def work(folder: Path, first: int) -> None:
    """Run the cases from number `first` on, in a worker. Print a line when a case starts, and one with its outcome."""
    out = os.fdopen(os.dup(1), "w")
    kinds = prepare()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 2)  # messages of libraries written in Rust
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30,) * 2)
    for kind, seed in ALL[first:]:
        print("start", file=out, flush=True)
        print(json.dumps(run_case(folder, kind, seed, kinds)), file=out, flush=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_every_case_works_or_is_refused_by_one_error_that_names_the_file():
    outcomes = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:  # in memory
        while len(outcomes) < len(ALL):
            command = [sys.executable, __file__, f"{folder}/case", str(len(outcomes))]
            worker = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            lines = worker.stdout.splitlines()
            assert lines, "the worker does not start"
            outcomes += [json.loads(line) for line in lines[1::2]]
            if len(lines) % 2:  # a case started and did not end
                outcomes.append(f"the worker died ({worker.returncode}; -27: over {SECONDS} s; -14: it waited)")
    bad = [f"{kind} {seed}: {wrong}" for (kind, seed), wrong in zip(ALL, outcomes, strict=True) if wrong]
    print(f"{len(ALL)} cases, {len(bad)} of them bad")
    assert not bad, f"{len(bad)} of {len(ALL)} cases: " + "\n".join(bad)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if sys.argv[-1] == "alone":
        print(run_case(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), prepare()) or "as it should be")
    else:
        work(Path(sys.argv[1]), int(sys.argv[2]))
