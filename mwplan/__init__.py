"""mwplan: plans and runs the gradient of a deep network within a memory budget, in JAX."""

from mwplan import adapters, layers, targets
from mwplan.common.errors import (
    ArgumentError,
    ChainError,
    CompilerMissingError,
    FileFormatError,
    InfeasibleError,
    MwplanError,
    NotSubmersiveError,
    ScheduleMismatchError,
    SecondDerivativeError,
    TargetError,
    TargetMemoryError,
)
from mwplan.compilers.compiling import PlanUndoneWarning, compiler_options, jit, temporaries
from mwplan.execution.execute import LOOSE, UNTIED, InputGrownWarning, Report, apply, value_and_grad
from mwplan.execution.tracing import Timeline, trace
from mwplan.execution.updates import init_states, value_and_update
from mwplan.fitting.fitted import Fitted
from mwplan.fitting.fitting import fit
from mwplan.fitting.remote import RemoteFit
from mwplan.functions import plain as _plain  # noqa: F401  (plain functions have rules)
from mwplan.functions.cut import Cut, cut
from mwplan.functions.fit_function import FittedFunction, fit_function
from mwplan.functions.registry import recognises
from mwplan.functions.remote_function import RemoteFunction
from mwplan.functions.stretches import Operation, Weight
from mwplan.network.chain import Chain, Stack, stack, unstack
from mwplan.network.operator import explain, fragment_of, vijp
from mwplan.network.tying import TiedWeightsWarning
from mwplan.network.wrapping import frozen, trainable
from mwplan.planning import Frontier, frontier, plan
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Run, RunKind, Schedule, Status, Strategy
from mwplan.profiling.estimating import estimate
from mwplan.profiling.measure import profile
from mwplan.targets.devices import Device, GpuChip, TpuChip
from mwplan.targets.peak import Peak, explain_peak

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 (plainly sorted, as the test compares it)
    "ArgumentError",
    "Chain",
    "ChainError",
    "CompilerMissingError",
    "Cut",
    "Device",
    "FileFormatError",
    "Fitted",
    "FittedFunction",
    "Frontier",
    "GpuChip",
    "InfeasibleError",
    "InputGrownWarning",
    "LOOSE",
    "MwplanError",
    "NotSubmersiveError",
    "Operation",
    "Peak",
    "PlanUndoneWarning",
    "Profile",
    "RemoteFit",
    "RemoteFunction",
    "Report",
    "Run",
    "RunKind",
    "Schedule",
    "ScheduleMismatchError",
    "SecondDerivativeError",
    "Stack",
    "Status",
    "Strategy",
    "TargetError",
    "TargetMemoryError",
    "TiedWeightsWarning",
    "Timeline",
    "TpuChip",
    "UNTIED",
    "Weight",
    "adapters",
    "apply",
    "compiler_options",
    "cut",
    "estimate",
    "explain",
    "explain_peak",
    "fit",
    "fit_function",
    "fragment_of",
    "frontier",
    "frozen",
    "init_states",
    "jit",
    "layers",
    "plan",
    "profile",
    "recognises",
    "replay",
    "stack",
    "targets",
    "temporaries",
    "trace",
    "trainable",
    "unstack",
    "value_and_grad",
    "value_and_update",
    "vijp",
]
