"""Settings for every test: eight devices, no silent promotion.

They stand here, at import, because JAX reads the number of devices when it starts.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
