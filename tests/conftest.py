"""Settings for every test: eight devices, quick compilation, no silent promotion.

They stand here, at import, because JAX reads some of them when it starts.
"""

import gc
import os

import jax

# A test compiles for longer than it computes: no time is spent on quick programs.
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    QUICK += ["--xla_cpu_use_fusion_emitters=false"]  # these compile twice as long
QUICK += ["--xla_cpu_parallel_codegen_split_count=1"]
gc.freeze()
gc.set_threshold(100_000, 50, 100)  # a trace makes many objects, and most stay alive
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads these programs
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # of other processes neither
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
