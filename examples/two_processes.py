"""One hypergradient, computed by two processes of four devices each, on data that is sharded.

Each process loads its half of scikit-learn's digits and spreads it over its four CPU devices; no
process ever holds all of the data. The solve is the one that a single device would do: `minimize`
is called on global arrays, `jax.jit` turns the means over samples into sums over devices
(all-reduces), and every process takes the same steps. The weights are replicated.

The program starts both processes itself, on this machine. On several machines, start it on each
with `--worker`, its number, and the address of the first as coordinator, as `jax.distributed` does.

    python examples/two_processes.py [--quick] [--output two_processes.png]
"""

import argparse
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

START = {"W": np.zeros((64, 10)), "b": np.zeros(10)}
THETA = np.full(64, -4.0)


def load(part=0, parts=1):
    """Return a part of training and validation data: images and labels, 800 of each in all."""
    images, labels = load_digits(return_X_y=True)
    sets = (images[:800] / 16, labels[:800]), (images[800:1600] / 16, labels[800:1600])
    return jax.tree.map(lambda rows: np.split(rows, parts)[part], sets)


def cross_entropy(weights, data):
    """Return the mean cross-entropy of a softmax regression."""
    x, y = data
    logits = x @ weights["W"] + weights["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def inner(weights, problem):
    """Return the training loss with a weight decay for each of the 64 pixels."""
    theta, data = problem
    return cross_entropy(weights, data) + 0.5 * jnp.exp(theta) @ jnp.sum(weights["W"] ** 2, axis=1)


def outer(theta, data, max_steps, throw):
    """Return the validation loss of the weights that minimize the training loss."""
    train, valid = data
    sol = dl.minimize(inner, START, (theta, train), max_steps=max_steps, throw=throw)
    return cross_entropy(sol.value, valid), sol.stats.num_fun_evals


def hypergradient(data, max_steps=1000, throw=True):
    """Return the compiled program that maps `theta` to value, evaluations and hypergradient."""
    step = jax.jit(
        jax.value_and_grad(lambda theta, data: outer(theta, data, max_steps, throw), has_aux=True)
    )
    return step.lower(THETA, data).compile()


# What follows starts the processes, compares and draws.

PROCESSES, DEVICES = 2, 4


def work(number, coordinator, results):
    """Do what one process does; the first saves what all of them found."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, PROCESSES, number)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((PROCESSES * DEVICES,), ("samples",), axis_types=auto)
    rows = NamedSharding(mesh, PartitionSpec("samples"))
    data = jax.tree.map(
        lambda local: jax.make_array_from_process_local_data(rows, local), load(number, PROCESSES)
    )
    step = hypergradient(data)
    started = time.perf_counter()
    (value, evaluations), gradient = jax.block_until_ready(step(THETA, data))
    seconds = time.perf_counter() - started
    # A solve that fails does so in every process: none is left waiting for another.
    failed = hypergradient(data, max_steps=3, throw=False)(THETA, data)[1]
    try:
        jax.block_until_ready(hypergradient(data, max_steps=3)(THETA, data))
        raised = False
    except RuntimeError as error:
        raised = "maximum number" in str(error)
    collectives = sorted(
        set(re.findall(r"all-\w+|collective-\w+|reduce-scatter", step.as_text() or ""))
    )
    print(
        f"process {number}: {len(jax.local_devices())} of {len(jax.devices())} devices, "
        f"validation loss {value:.6f}, {seconds * 1e3:.0f} ms, collectives: {collectives}, "
        f"a solve of 3 steps {'raises' if raised else 'does not raise'}",
        flush=True,
    )
    if number == 0:
        np.savez(
            results,
            value=value,
            evaluations=evaluations,
            gradient=gradient,
            failed=failed,
            raised=raised,
            collectives=collectives,
        )
    jax.distributed.shutdown()


def launch(results):
    """Start all processes and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, __file__, "--results", str(results), "--coordinator", coordinator]
    workers = [
        subprocess.Popen(
            [*command, "--worker", str(number)], env={**os.environ, "XLA_FLAGS": flags}
        )
        for number in range(PROCESSES)
    ]
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * PROCESSES, codes


def draw(gradients, path):
    """Save the hypergradients as images of 8 x 8 pixels."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    for panel, (title, gradient) in zip(panels, gradients.items(), strict=True):
        size = np.abs(gradient).max()
        image = panel.imshow(gradient.reshape(8, 8), cmap="RdBu", vmin=-size, vmax=size)
        figure.colorbar(image, ax=panel)
        panel.set(title=title, xticks=[], yticks=[])
    figure.suptitle("derivative of the validation loss by the weight decay of each pixel")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    """Compare two processes with one device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same: it is quick")
    parser.add_argument("--output", type=pathlib.Path, default="two_processes.png")
    parser.add_argument("--worker", type=int, help="be this process, and start no others")
    parser.add_argument("--coordinator", help="address of process 0, for workers")
    parser.add_argument("--results", type=pathlib.Path, help="where process 0 saves, for workers")
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, options.coordinator, options.results)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder) / "results.npz"
        launch(results)
        found = dict(np.load(results))
    data = jax.tree.map(jnp.asarray, load())
    (value, evaluations), gradient = hypergradient(data)(THETA, data)
    error = np.linalg.norm(found["gradient"] - gradient) / np.linalg.norm(gradient)
    print(
        f"one device: validation loss {value:.6f}, {evaluations} evaluations; "
        f"two processes: {found['value']:.6f}, {found['evaluations']}; error {error:.1e}"
    )
    assert error < 1e-10
    assert list(found["collectives"]) == ["all-reduce"], "the data were gathered"
    assert found["raised"]
    assert np.all(np.isnan(found["failed"]))
    draw(
        {
            "one device": np.asarray(gradient),
            "two processes": found["gradient"],
            "difference": found["gradient"] - np.asarray(gradient),
        },
        options.output,
    )


if __name__ == "__main__":
    main()
