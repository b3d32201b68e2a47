"""A network as a chain of layers, what each layer keeps and how its cotangent comes back. Imports
`common`."""
