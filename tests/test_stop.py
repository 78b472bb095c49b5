"""`stop`: a predicate of the user's that ends a solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import difflbfgs as dl

POLISH = [0, 1]


def rosenbrock(x, theta):
    return jnp.sum(theta * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


X0 = jnp.array([-1.2, 1.0, -0.5, 0.8])


def solve(theta=100.0, stop=None, **settings):
    return dl.minimize(rosenbrock, X0, theta, stop=stop, **settings)


@pytest.mark.parametrize("polish", POLISH)
def test_ends_at_the_step_that_it_names(polish):
    steps = []
    solver = dl.LBFGS(polish=polish)
    whole = solve(solver=solver, callback=steps.append)
    jax.effects_barrier()
    named = {int(step.num_steps): step for step in steps}
    solution = solve(solver=solver, stop=lambda step: step.num_steps >= 7)
    assert solution.result == dl.RESULTS.stopped
    assert not solution.converged
    assert solution.stats.num_steps in (7, 8)  # a search that failed is no step taken
    step = named[int(solution.stats.num_steps)]
    # Two programs round differently, and a path of seven steps carries that on.
    assert solution.objective == pytest.approx(float(step.objective), rel=1e-9)
    assert solution.stats.grad_norm == pytest.approx(float(step.grad_norm), rel=1e-9)
    assert solution.stats.num_steps < whole.stats.num_steps


def test_a_test_that_holds_comes_first_and_never_stopping_changes_nothing():
    whole = solve()
    never = solve(stop=lambda step: step.num_steps < 0)
    # Two programs round differently.
    np.testing.assert_allclose(never.value, whole.value, rtol=1e-12)
    assert never.stats.num_steps == whole.stats.num_steps
    assert never.result == dl.RESULTS.successful
    last = solve(stop=lambda step: step.num_steps >= whole.stats.num_steps)
    assert last.result == dl.RESULTS.successful
    np.testing.assert_allclose(last.value, whole.value, rtol=1e-12)


def test_goes_on_from_where_it_stopped():
    early = solve(stop=lambda step: step.objective < 1.0)
    assert early.objective < 1.0
    late = solve(state=early.state)
    np.testing.assert_allclose(late.value, np.ones(4), atol=1e-8)


def test_sees_the_variables_and_traced_arrays():
    x0 = {"w": jnp.zeros(3, jnp.float32), "name": "ridge"}

    def fun(x, theta):
        return jnp.sum((x["w"] - theta) ** 4) + jnp.sum(x["w"] ** 2)

    @eqx.filter_jit
    def early(limit):
        def stop(step):
            assert step.value["name"] == "ridge"
            assert step.value["w"].dtype == jnp.float32
            return jnp.linalg.norm(step.value["w"]) > limit

        return dl.minimize(fun, x0, jnp.arange(3.0) + 1, stop=stop)

    whole = dl.minimize(fun, x0, jnp.arange(3.0) + 1)
    length = jnp.linalg.norm(whole.value["w"])
    half = early(0.5 * length)
    assert half.result == dl.RESULTS.stopped
    assert jnp.linalg.norm(half.value["w"]) > 0.5 * length
    assert early(2 * length).result == dl.RESULTS.successful


def test_each_lane_stops_alone():
    limits = jnp.array([1e2, 1.0, -1.0])

    def lane(limit):
        return solve(stop=lambda step: step.objective < limit)

    lanes = jax.jit(jax.vmap(lane))(limits)
    for k, limit in enumerate(limits):
        alone = lane(limit)
        stopped = lanes.result == dl.RESULTS.stopped
        assert stopped[k] == (alone.result == dl.RESULTS.stopped)
        assert lanes.stats.num_steps[k] == alone.stats.num_steps
        np.testing.assert_allclose(lanes.value[k], alone.value, atol=1e-12)


@pytest.mark.slow
class TestDerivatives:
    @staticmethod
    def stopped(theta, of="value", **settings):
        found = getattr(solve(theta, stop=lambda step: step.num_steps >= 5, **settings), of)
        return jnp.sum(found)

    @pytest.mark.parametrize("of", ["value", "objective"])
    @pytest.mark.parametrize("forward", [False, True])
    def test_refused(self, of, forward):
        adjoint = dl.ForwardImplicitAdjoint() if forward else dl.ImplicitAdjoint()
        jax.block_until_ready(self.stopped(100.0, of, adjoint=adjoint))  # the primal never raises
        derivative = (jax.jacfwd if forward else jax.grad)(
            lambda theta, **settings: self.stopped(theta, of, adjoint=adjoint, **settings)
        )
        for call in (derivative, jax.jit(derivative)):
            with pytest.raises(RuntimeError, match="`stop` said so"):
                jax.block_until_ready(call(100.0))
        assert jnp.isnan(derivative(100.0, throw=False))

    def test_taken_if_asked(self):
        adjoint = dl.ImplicitAdjoint(approximate=True)
        derivative = jax.grad(lambda theta: self.stopped(theta, adjoint=adjoint))(100.0)
        assert jnp.isfinite(derivative)

    def test_hypergradient(self):
        def step(**settings):
            return dl.value_and_hypergrad(
                lambda x, theta: jnp.sum(x),
                rosenbrock,
                stop=lambda step: step.num_steps >= 5,
                **settings,
            )

        _, gradient, info = step(throw=False)(100.0, X0)
        assert info.result == dl.RESULTS.stopped
        assert jnp.isnan(gradient)
        assert jnp.isinf(info.error_estimate)
        with pytest.raises(RuntimeError, match="`stop` said so"):
            jax.block_until_ready(step()(100.0, X0)[1])

    def test_not_differentiated_through(self):
        def outer(limit):
            solution = solve(stop=lambda step: step.objective < limit, throw=False)
            return jnp.sum(solution.value)

        assert jax.grad(outer)(-1.0) == 0


def test_hypergradient_is_watched():
    steps = []
    step = dl.value_and_hypergrad(lambda x, theta: jnp.sum(x), rosenbrock, callback=steps.append)
    _, _, info = step(100.0, X0)
    jax.effects_barrier()
    assert max(int(one.num_steps) for one in steps) == info.solution.stats.num_steps


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"stop must be a function, got 3"):
        solve(stop=3)
    with pytest.raises(TypeError, match="boolean scalar, and it returned"):
        solve(stop=lambda step: step.objective)
    with pytest.raises(TypeError, match="boolean scalar, and it returned"):
        solve(stop=lambda step: step.value > 0)
    with pytest.raises(ValueError, match="stop ends a solve of LBFGS"):
        solve(stop=lambda step: True, solver=dl.Unrolled(optax.sgd(0.1), 3))
