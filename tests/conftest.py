"""Eight fake devices for every test, programs that are compiled cheaply, and caches that are thrown away."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

from transformer_jax import heap


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Leave machine code as it comes, in the processes that a test starts too: most programs run a few times.

    That takes 40 % off compiling, and a program is the same up to the last passes. A test marked `optimised` computes
    for long, or measures.
    """
    cheaply = item.get_closest_marker("optimised") is None
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(cheaply)
    jax.config.update("jax_disable_most_optimizations", cheaply)


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """Keep tokenizers, prepared datasets and tokenized text of the tests away from the user's."""
    home = tmp_path_factory.getbasetemp().parent / "caches"  # shared by the workers of one pytest run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
        # Many tests train the same tiny model: compile it once, in the processes they start too.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        patch.setattr(heap, "keep", lambda: None)  # one process, a thousand programs: let it give back what it can
        jax.config.update("jax_compilation_cache_dir", str(home / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        yield
