"""Any JAX function as a chain: traced, cut where little is alive, planned. Imports `fitting` and below."""
