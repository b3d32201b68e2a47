"""Solvers of the planning problem: no JAX here, and OR-tools only where it is called.

The plan space and the cost of every run are those of docs/accounting.md; each module here is one way to
search it. Import the module you need: `mwplan.solvers.frontier`, `mwplan.solvers.integer_program`, ...
"""
