"""From a profile and a budget to a schedule.

The front door of the solvers. Imports `solvers`, `plans` and below.
"""
