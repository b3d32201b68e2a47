"""Adapters for other libraries' networks."""
