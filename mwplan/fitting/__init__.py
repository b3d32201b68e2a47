"""From a budget to a compiled step that keeps it. Imports `planning`, `profiling`, `execution` and below."""
