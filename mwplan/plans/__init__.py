"""Plans as plain data.

Profiles, schedules, the ledger that replays them, and how buffers are packed. No JAX; imports `common`.
"""
