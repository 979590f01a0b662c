import os

import jax
import pytest

# Compiling is most of the time of the tests: take the fast compiler rather than the fast code.
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
if jax.__version_info__[:2] == (0, 10):  # an unknown flag would end the program
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

jax.config.update("jax_enable_x64", True)


@pytest.fixture
def key():
    return jax.random.key(0)
