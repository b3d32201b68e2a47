"""How strategies and kinds of memory look: colours that the colour-blind tell apart (mostly those of Okabe
and Ito, which also differ in lightness), a letter and a pattern each: nothing is told by colour alone."""

from __future__ import annotations

from dataclasses import dataclass

from mwplan.plans.holdings import Kind
from mwplan.plans.schedule import LETTERS, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """`color`, of the area, `ink`, of letters on it, as CSS; `pattern`, plotly's; `letter`; `what`, a line on
    what it is."""

    color: str
    ink: str
    pattern: str
    letter: str
    what: str


def _strategy(strategy: Strategy, color: str, ink: str, pattern: str, what: str) -> Look:
    return Look(color=color, ink=ink, pattern=pattern, letter=LETTERS[strategy], what=what)


STRATEGIES = {
    Strategy.STORE: _strategy(Strategy.STORE, "#d55e00", "#000", "", "residuals kept: backpropagation"),
    Strategy.RECOMPUTE: _strategy(
        Strategy.RECOMPUTE, "#f0e442", "#000", "/", "run again from the input of several layers"
    ),
    Strategy.FRAGMENT: _strategy(
        Strategy.FRAGMENT, "#56b4e9", "#000", ".", "cotangent rebuilt from a part of it that is kept"
    ),
    Strategy.VIJP: _strategy(
        Strategy.VIJP, "#0072b2", "#fff", "\\", "cotangent rebuilt by a vijp: nothing of it is kept"
    ),
    Strategy.INVERT: _strategy(
        Strategy.INVERT, "#cc79a7", "#000", "x", "activations rebuilt from the output"
    ),
    Strategy.OFFLOAD: _strategy(Strategy.OFFLOAD, "#999999", "#000", "-", "residuals in the host's memory"),
}

KINDS = {
    Kind.ACTIVATIONS: Look(
        color="#8fd3b6", ink="#000", pattern="", letter="A", what="what layers take and return"
    ),
    Kind.RESIDUALS: Look(
        color="#d55e00", ink="#000", pattern="/", letter="Q", what="what vjps keep from the forward pass"
    ),
    Kind.FRAGMENTS: Look(
        color="#56b4e9", ink="#000", pattern=".", letter="F", what="parts of cotangents that layers erase"
    ),
    Kind.COTANGENTS: Look(
        color="#0072b2", ink="#fff", pattern="\\", letter="C", what="gradients with respect to activations"
    ),
    Kind.WORKSPACE: Look(
        color="#e69f00", ink="#000", pattern="x", letter="W", what="what one operation allocates for itself"
    ),
}
#: what is there all the time: parameters, gradients, input, tables
ALWAYS = Look(
    color="#c8c8c8", ink="#000", pattern="", letter="P", what="parameters, their gradients, the input"
)
#: of the lines in the frontier
FRONTIER, RECOMPUTATION, BACKPROPAGATION = "#0072b2", "#a06000", "#d55e00"
