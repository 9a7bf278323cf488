"""The commit of the code that measures."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from ddpm_jax.reproduction import provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_commit_whose_files_were_changed_is_marked(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # of a hook that runs the tests: they name another repository
    monkeypatch.setattr(provenance, "checkout", lambda: tmp_path)

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("1\n")
    git("init", "--quiet")
    git("add", "code.py")
    git("commit", "--quiet", "--no-gpg-sign", "--message=first")
    commit = git("rev-parse", "--short", "HEAD")
    assert provenance.commit() == commit
    file.write_text("2\n")
    assert provenance.commit() == f"{commit}+"
