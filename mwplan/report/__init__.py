"""A plan as a page that one looks at. Imports `plans` and below; the wings above hand it their results."""
