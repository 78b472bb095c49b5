"""Minimize with L-BFGS in JAX and differentiate the minimizer, exactly, without unrolling."""

from difflbfgs._adjoint import ForwardImplicitAdjoint, ImplicitAdjoint
from difflbfgs._lbfgs import LBFGS
from difflbfgs._minimize import minimize
from difflbfgs._solution import RESULTS, Solution, Stats
from difflbfgs._unrolled import Unrolled
from difflbfgs._watch import Step, progress_bar

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "RESULTS",
    "ForwardImplicitAdjoint",
    "ImplicitAdjoint",
    "Solution",
    "Stats",
    "Step",
    "Unrolled",
    "minimize",
    "progress_bar",
]
