"""What a run says it was made of: this code's commit, versions, model and data."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch

from data.conversations import WORLD
from lib.checkpoint import commit, provenance

ROOT = Path(__file__).parent.parent
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder, *arguments) -> str:
    """A git command's output, whatever the machine's settings and hooks say."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "safe.directory=*"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A folder with one commit, of one file, and a tag on it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "a.py").write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    git(folder, "tag", "-a", "v1", "-m", "v1")
    return folder


def test_versions_and_both_fingerprints_are_those_of_their_bytes(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "a"}\n')
    found = provenance(WORLD / "model", tmp_path / "data.jsonl")
    files = b"".join((WORLD / "model" / name).read_bytes() for name in ("config.json", "model.safetensors"))
    assert found["model_sha256"] == hashlib.sha256(files).hexdigest()
    assert found["data_sha256"] == hashlib.sha256(b'{"prompt": "a"}\n').hexdigest()
    assert found["versions"] == {"python": platform.python_version(), "torch": str(torch.__version__), "tokenizers": tokenizers.__version__}
    assert found["commit"] == commit() and list(found) == ["commit", "versions", "model_sha256", "data_sha256"]
    assert json.loads(json.dumps(found)) == found


@needs_git
def test_the_commit_is_whole_and_says_whether_tracked_files_differ(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert len(head) == 40 and commit(checkout) == head
    (checkout / "data.jsonl").write_text("{}")
    assert commit(checkout) == head  # one's own files beside the code change nothing
    (checkout / "a.py").write_text("2")
    assert commit(checkout) == head + "-dirty"
    git(checkout, "add", "a.py")
    assert commit(checkout) == head + "-dirty"
    (checkout / "a.py").write_text("1")
    git(checkout, "add", "a.py")
    assert commit(checkout) == head


@needs_git
def test_a_copy_without_history_has_none_even_inside_a_checkout(checkout, tmp_path):
    (checkout / "copy").mkdir()
    assert commit(checkout / "copy") is None and commit(tmp_path) is None
    (tmp_path / "link").symlink_to(checkout / "copy")
    assert commit(tmp_path / "link") is None
    git(tmp_path, "init", "-q", "empty")
    assert commit(tmp_path / "empty") is None  # nothing is committed yet


@pytest.mark.skipif(os.name != "posix", reason="the stand-ins for git are shell scripts")
@pytest.mark.parametrize("script", [None, "echo gone >&2; exit 128"])
def test_git_that_is_absent_or_fails_is_no_error(script, tmp_path, monkeypatch):
    if script:
        (tmp_path / "git").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
