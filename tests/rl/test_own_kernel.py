"""A kernel from outside the package in an agent: by ``module:Name``, in training and in sweeps."""

import sys

import pytest
import torch
from helpers import own_schemes
from helpers.killed_rl import configuration
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import SweepConfig, load_agent, run_export, train
from applications.rl.export import ExportConfig
from applications.rl.sweep import worker
from flows.training import CheckpointError
from flows.training import checkpoint as checkpoints

NAME = "helpers.own_schemes:Tempered"
BRIEF = {"offline_steps": 4, "online_steps": 0}


def fit(folder, kernel, **changes):
    config = configuration(folder, BRIEF, options=options("qam", kernel=kernel), **changes)
    (run,) = train(config, environment=Corridor, dataset=corridor_data())
    return run


def test_a_kernel_of_the_same_table_trains_the_same_agent(tmp_path):
    own, known = fit(tmp_path / "own", NAME), fit(tmp_path / "known", "ancestral_pair")
    for a, b in zip(own.agent.parameters(), known.agent.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    identities = [
        checkpoints.load(run.folder / "checkpoint.pt")["identity"] for run in (own, known)
    ]
    assert identities[0]["options.kernel"] == NAME
    assert "kernel_table" not in identities[1]


def test_a_resume_with_another_table_is_refused(tmp_path, monkeypatch):
    fit(tmp_path, NAME)
    fit(tmp_path, NAME, resume=True)
    monkeypatch.setattr(own_schemes.Tempered.__init__, "__defaults__", (0.5,))
    with pytest.raises(CheckpointError, match="kernel_table"):
        fit(tmp_path, NAME, resume=True)


@pytest.mark.slow
def test_a_checkpoint_imports_no_kernel_that_is_not_named(tmp_path, monkeypatch):
    run = fit(tmp_path, NAME)
    assert load_agent(run.folder).agent.config.kernel == NAME
    monkeypatch.delitem(sys.modules, "helpers.own_schemes")
    with pytest.raises(CheckpointError, match=f"if you trust it, name it: --kernel {NAME}"):
        load_agent(run.folder)
    with pytest.raises(CheckpointError, match="if you trust it"):
        load_agent(run.folder, kernel="helpers.own_schemes:WrongAdjoint")
    assert "helpers.own_schemes" not in sys.modules
    run_export(ExportConfig(run.folder, kernel=NAME, repeats=1))
    assert "helpers.own_schemes" in sys.modules


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("heun", "kernel must be one of .*, or module:Name, got 'heun'"),
        ("no.such:Kernel", "there is no module 'no.such'"),
        ("helpers.own_schemes:torch", "kernel must be of type Scheme"),
        ("adjoint.chain.kernels:MomentMatched", "measures nothing .*which needs mmse"),
        ("adjoint.chain.kernels:CovarianceMatched", "measures nothing of the flow"),
    ],
)
def test_what_an_agent_cannot_have_is_refused_before_any_work(tmp_path, kernel, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "x", kernel)
    assert not (tmp_path / "x").exists()


def sweep(folder, **changes):
    setting = {"tasks": ("gym:Pendulum-v1",), "agents": ("qam",), "seeds": ("0",), "kernel": NAME}
    return SweepConfig(**(setting | {"folder": folder} | changes))


def test_in_a_sweep(tmp_path):
    def train_corridor(config):
        small = options("qam", kernel=config.options.kernel)
        own = configuration(config.folder, BRIEF, options=small, seeds=config.seeds)
        return train(own, environment=Corridor, dataset=corridor_data())

    (job,) = sweep(tmp_path).plan.jobs
    assert job.config.options.kernel == NAME
    assert worker.work(job, "one", train_corridor) == {}
    assert load_agent(job.runs[0].folder).agent.config.kernel == NAME
    (job,) = sweep(tmp_path, kernel=None).plan.jobs
    assert job.config.options is None
    with pytest.raises(ValueError, match="kernel must not be given with agent 'bc', which has no"):
        _ = sweep(tmp_path, agents=("qam", "bc")).plan
    with pytest.raises(ValueError, match=r"there is no module 'no\.such'"):
        _ = sweep(tmp_path, kernel="no.such:Kernel").plan
