"""Settings for every test: eight devices, quick compilation, no silent promotion.

They stand here, at import, because JAX reads some of them when it starts.
"""

import os

# A test compiles for longer than it computes: no time is spent on quick programs.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
