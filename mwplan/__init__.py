"""mwplan: plans and runs the gradient of a deep network within a memory budget, in JAX."""

from mwplan import adapters, layers
from mwplan.chain import Chain, Stack, stack, unstack
from mwplan.compiling import PlanUndoneWarning, compiler_options, jit, temporaries
from mwplan.errors import (
    ArgumentError,
    ChainError,
    FileFormatError,
    InfeasibleError,
    MwplanError,
    NotSubmersiveError,
    ScheduleMismatchError,
    SecondDerivativeError,
)
from mwplan.estimating import estimate
from mwplan.execute import LOOSE, UNTIED, InputGrownWarning, Report, apply, value_and_grad
from mwplan.fitting import Fitted, fit
from mwplan.ledger import replay
from mwplan.measure import profile
from mwplan.operator import explain, fragment_of, vijp
from mwplan.planning import Frontier, frontier, plan
from mwplan.profiles import Profile
from mwplan.roofline import Device
from mwplan.schedule import Run, RunKind, Schedule, Status, Strategy
from mwplan.tracing import Timeline, trace
from mwplan.updates import init_states, value_and_update

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 (plainly sorted, as the test compares it)
    "ArgumentError",
    "Chain",
    "ChainError",
    "Device",
    "FileFormatError",
    "Fitted",
    "Frontier",
    "InfeasibleError",
    "InputGrownWarning",
    "LOOSE",
    "MwplanError",
    "NotSubmersiveError",
    "PlanUndoneWarning",
    "Profile",
    "Report",
    "Run",
    "RunKind",
    "Schedule",
    "ScheduleMismatchError",
    "SecondDerivativeError",
    "Stack",
    "Status",
    "Strategy",
    "Timeline",
    "UNTIED",
    "adapters",
    "apply",
    "compiler_options",
    "estimate",
    "explain",
    "fit",
    "fragment_of",
    "frontier",
    "init_states",
    "jit",
    "layers",
    "plan",
    "profile",
    "replay",
    "stack",
    "temporaries",
    "trace",
    "unstack",
    "value_and_grad",
    "value_and_update",
    "vijp",
]
