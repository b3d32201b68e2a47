"""The command line and the training example. Imports everything below."""
