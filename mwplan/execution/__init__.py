"""Runs a schedule.

As a differentiable function, as loops, or operation by operation. Imports `network`, `plans`, `compilers` and
below.
"""
