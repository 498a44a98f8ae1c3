"""Compiled programs are kept where the user's other caches are, unless JAX was told otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from transformer_jax import compilation_cache

PROGRAM = """
import sys
import jax
from transformer_jax import compilation_cache
from transformer_jax.cli import main
try:
    main(["list"])
except SystemExit:
    pass
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: x * 3 + 1)(2.5))
print(compilation_cache.where())
"""


@pytest.fixture
def unset(tmp_path, monkeypatch):
    """As a user has it: nothing is set, and a home of its own."""
    before = {
        name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_folder_is_taken(unset):
    compilation_cache.keep()
    folder = Path(compilation_cache.where())
    assert folder.parent == unset / "transformer_jax" / "compiled"
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.LARGEST


def test_what_jax_was_told_stays(unset):
    jax.config.update("jax_compilation_cache_dir", str(unset / "mine"))
    compilation_cache.keep()
    compilation_cache.leave()
    assert compilation_cache.where() == str(unset / "mine")


def test_switched_off(unset):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        compilation_cache.keep()
        assert (compilation_cache.where(), list(unset.iterdir())) == ("", [])
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_several_processes_compile_anew(unset):
    compilation_cache.keep()
    try:
        compilation_cache.leave()
        assert compilation_cache.where() == ""
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_home_that_cannot_be_written_is_said(unset, capsys):
    (unset / "transformer_jax").write_text("a file")
    compilation_cache.keep()
    assert compilation_cache.where() == ""
    assert "compiled programs are not kept" in capsys.readouterr().err


def test_unlike_processors_do_not_share(unset, monkeypatch):
    here = compilation_cache._own()
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "other")
    assert compilation_cache._own() != here
    assert compilation_cache._own().parent == here.parent


@pytest.mark.slow
def test_the_command_line_fills_and_reads_it(tmp_path):
    own = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name} | own
    first, second = (
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    folder = Path(first.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path)
    assert list(folder.glob("*-cache"))
    assert "not supported on the host" not in second.stderr  # XLA's complaint of another machine's program
