"""Networks of other libraries as layers of a chain.

An Equinox module is a callable pytree already: put it into `mw.Chain([...])` as it is. Flax modules keep
their parameters apart from their code; `mwplan.adapters.flax` joins the two.
"""

from mwplan.adapters import flax

__all__ = ["flax"]
