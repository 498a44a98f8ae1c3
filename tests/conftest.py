"""Eight fake devices for every test, and a home for caches that is thrown away."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import pytest


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """Keep tokenizers, prepared datasets and tokenized text of the tests away from the user's."""
    home = tmp_path_factory.getbasetemp().parent / "caches"  # shared by the workers of one pytest run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
        yield
