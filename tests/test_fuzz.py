"""Each hostile file works, or ends in one DataError or ModelError that names the file, within limits on processor time and memory.

Cases run in a worker, which the test starts again behind a case that hangs or dies. One case by itself, its files left to look at:
`python tests/test_fuzz.py FOLDER records 17 alone`; what was in FOLDER is deleted.
"""

import json
import os
import random
import resource
import select
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

CASES = {"records": 300, "risks": 100, "model": 200, "tokenizer": 120, "template": 80, "probe": 80, "adapter": 80, "verdicts": 80,
         "run": 100, "resume": 120}
SECONDS, GIGABYTES = 5, 2  # processor time of a case; memory on top of the imports
RENDERINGS = 12  # more than a case has: each may take its limit of processor time
PATIENCE = 120  # seconds of waiting: far more, so that a busy machine fails no case


class Plain(random.Random):
    """No chance: a named case changes the first of the sound files."""

    random, choice = (lambda self: 0.99), (lambda self, values: values[0])


def work(folder: Path, start: tuple, alone: bool) -> None:
    """Cases from `start` on, each announced and then told of, a line each: (kind, seed), what is wrong or nothing."""
    out = os.fdopen(os.dup(1), "w")
    kinds = prepare()
    from lib import template

    if not alone:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 2)  # Rust's panics
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30,) * 2)
    cases = [(kind, seed) for kind, n in {**CASES, "named": len(NAMED)}.items() for seed in range(n)]
    cases = [start] if alone else cases[cases.index(start) :]
    for kind, seed in cases:
        print(json.dumps([kind, seed]), file=out, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng, words, wrong = random.Random(f"{kind} {seed}"), None, ""
        of = NAMED[seed][0] if kind == "named" else kind
        make, read = kinds[of]
        files = make(folder, Plain() if kind == "named" else rng)
        if kind == "named":
            _, change, words = NAMED[seed]
            change(folder)
        for file in files if kind != "named" else ():
            mutate(file, rng)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # template processes that reached a limit
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # counts processor time, then ends this worker
        try:
            read(folder)
            wrong = f"accepted, expected {words!r}" if words else ""
        except Exception as error:
            said = str(error)
            if type(error).__name__ not in ("DataError", "ModelError") or str(folder) not in said or len(said) > 5000:
                wrong = f"{type(error).__name__}: {said[:300]}" + " ".join(traceback.format_exc().splitlines()[-3:-1])
            elif words and words not in said:
                wrong = f"expected {words!r}, found {said[:300]!r}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
        if seconds > RENDERINGS * template.SECONDS:
            wrong = f"its child processes took {seconds:.1f} s"
        print(json.dumps(wrong), file=out, flush=True)
        if alone:
            print(wrong or "as it should be")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_every_case_works_or_is_refused_by_one_error_that_names_the_file():
    quick = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # of memory: thousands of small files come and go
    with tempfile.TemporaryDirectory(dir=quick) as folder:
        check_all(Path(folder))


def check_all(folder: Path) -> None:
    """Run every case in workers, and fail with what is wrong."""
    cases = [[kind, seed] for kind, n in {**CASES, "named": len(NAMED)}.items() for seed in range(n)]
    found, at = {}, 0
    while at < len(cases):
        command = [sys.executable, __file__, folder / "case", *map(str, cases[at])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as worker:
            lines, running = b"", True
            while running:
                ready = select.select([worker.stdout], [], [], PATIENCE)[0]
                data = os.read(worker.stdout.fileno(), 1 << 16) if ready else b""
                lines, running = lines + data, bool(data)
            worker.kill()
        told = [json.loads(line) for line in lines.decode().split("\n") if line]
        found |= {tuple(case): wrong for case, wrong in zip(told[::2], told[1::2])}
        assert told, "the worker does not start"
        if len(told) % 2:  # a case was begun and did not end
            found[tuple(told[-1])] = f"the worker died ({worker.returncode}; -27: over {SECONDS} s) or waited"
        at += (len(told) + 1) // 2
    bad = {case: wrong for case, wrong in found.items() if wrong}
    print(f"{len(found)} cases, {len(bad)} of them bad")
    assert not bad, f"{len(bad)} of {len(found)} cases: " + "\n".join(f"{kind} {seed}: {wrong}" for (kind, seed), wrong in bad.items())
    assert len(found) == len(cases)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    work(Path(sys.argv[1]), (sys.argv[2], int(sys.argv[3])), alone=len(sys.argv) > 4)
