"""Data, parameters and tasks on several devices (processes: `examples/two_processes.py`)."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent / "eight_devices.py"


@pytest.mark.slow
def test_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,  # a hang is what this test is there to see
        check=False,
    )
    written = [node for node in ast.parse(PROGRAM.read_text()).body if hasattr(node, "name")]
    tests = [node.name for node in written if node.name.startswith("test_")]
    assert run.stdout.split() == tests, run.stderr[-3000:]
