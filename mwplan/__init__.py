"""mwplan: plans and runs the gradient of a deep network within a memory budget, in JAX."""

__version__ = "0.1.0"
__all__ = ["__version__"]
