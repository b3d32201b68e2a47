"""Solvers of the planning problem: no JAX here, and OR-tools only where it is called."""
