"""Settings of a process, looked at in one of their own."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from flows.training import prepare_process
torch.set_num_threads(1)
prepare_process()
assert float(torch.tensor(1e-30) * torch.tensor(1e-10)) == 0.0
for _ in range(3):
    torch.ones(1 << 24).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_denormals_are_flushed_and_freed_memory_stays():
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    pages = 10 * (1 << 24) * 4 // 4096
    if sys.platform.startswith("linux"):
        assert int(result.stdout) < pages / 2  # all of them, were it returned
