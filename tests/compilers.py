"""Which tests need a compiler for a device that is not here."""

from __future__ import annotations

import pytest

from mwplan import targets
from mwplan.targets import plugins


def needs(name: str) -> pytest.MarkDecorator:
    """Skips, with the reason, where nothing can be compiled for the device of that name."""
    why = plugins.missing(targets.DEVICES[name])
    return pytest.mark.skipif(why is not None, reason=f"for {name}: {why}")


GPU, TPU = needs("h200"), needs("v5e")
