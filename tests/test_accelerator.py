"""What `benchmarks/accelerator.py` checks on an accelerator holds without one."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "accelerator.py"


@pytest.mark.slow
def test_every_check_is_right_without_an_accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("accelerator", PATH)
    assert spec is not None
    assert spec.loader is not None
    accelerator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accelerator)
    rows = accelerator.correctness(quick=True)
    assert len(rows) > 20
    assert [row["name"] for row in rows if not row["ok"]] == []
