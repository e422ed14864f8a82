"""Functions of whole networks."""
