"""Minimize with L-BFGS in JAX and differentiate the minimizer, exactly, without unrolling."""

from difflbfgs._adjoint import ForwardImplicitAdjoint, ImplicitAdjoint, QuasiNewtonAdjoint
from difflbfgs._hessian import hessian_operator
from difflbfgs._hypergrad import HypergradInfo, value_and_hypergrad
from difflbfgs._inverse_hessian import inverse_hessian_operator
from difflbfgs._known import known_minimizer
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
    "HypergradInfo",
    "ImplicitAdjoint",
    "QuasiNewtonAdjoint",
    "Solution",
    "Stats",
    "Step",
    "Unrolled",
    "hessian_operator",
    "inverse_hessian_operator",
    "known_minimizer",
    "minimize",
    "progress_bar",
    "value_and_hypergrad",
]
