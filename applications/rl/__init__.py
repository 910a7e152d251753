"""Flow-policy agents for offline and offline-to-online reinforcement learning.

    from applications.rl import TrainConfig, train

    (run,) = train(TrainConfig(task="pointmaze-medium-navigate-singletask-task1-v0", agent="qam"))

An agent is a flow over chunks of actions, tilted toward a Q-critic.  Names are imported from their
files when they are first used, so that ``import applications.rl`` costs nothing, and no part needs
the optional packages of another.  The imports under ``TYPE_CHECKING`` are for editors and mypy.
"""
# ruff: noqa: F401  (a facade imports for others)

from importlib import import_module
from typing import TYPE_CHECKING

__version__: str

_FILES = {
    # Train an agent
    "training.config": "TrainConfig",
    "training.train": "Trained train",
    # Evaluate it, and read it back from its run folder
    "evaluation.evaluator": "Evaluation EpisodeEvaluator evaluate",
    "run_folder": "TrainedAgent load_agent",
    # Agents and their options
    "agents.registry": "AGENTS agent_name find_agent make_agent",
    "agents.presets": "preset",
    "agents.bc": "BC BCConfig",
    "agents.qam": "QAM QAMConfig",
    "agents.qam_e": "QAME QAMEConfig",
    "agents.qam_f": "QAMF QAMFConfig",
    "agents.fql": "FQL FQLConfig",
    "agents.ifql": "IFQL IFQLConfig",
    "agents.bam": "BAM BAMConfig",
    "agents.fawac": "FAWAC FAWACConfig",
    "agents.fbrac": "FBRAC FBRACConfig",
    "agents.cgql": "CGQL CGQLConfig",
    "agents.cgql_mse": "CGQLMSE CGQLMSEConfig",
    "agents.cgql_linex": "CGQLLinex CGQLLinexConfig",
    "agents.rql": "RQL RQLConfig",
    "agents.fedit": "FEdit FEditConfig",
    "agents.dsrl": "DSRL DSRLConfig",
    "agents.qsm": "QSM QSMConfig",
    "agents.dac": "DAC DACConfig",
    "agents.rebrac": "ReBRAC ReBRACConfig",
    "agents.trqam": "TRQAM TRQAMConfig",
    "agents.sqam": "SQAM SQAMConfig",
    "agents.rlpd": "RLPD RLPDConfig",
    # An agent of one's own
    "agents.base": "Agent Shapes Uniform",
    "agents.options": "AgentConfig BestOfOptions CriticOptions EntropyOptions MatchingOptions "
    "Range TiltOptions above at_least one_of checked_option",
    "agents.networks": "Critics DeterministicActor FlowActor OneStepActor TanhGaussianActor "
    "TimedCritics ValueNetwork",
    "agents.rollouts": "FlowODE Noise best_of candidates condition first_ranked flow_action",
    "agents.losses": "Metrics Term behaviour_loss bootstrap critic_loss critic_term "
    "expectile_errors expectile_loss one_step_loss pessimistic td_target",
    "agents.losses_gaussian": "edit_loss entropy_loss",
    "agents.running_state": "RunningState",
    "agents.domains": "by_domain",
    "agents.testing": "check_agent",
    # Tasks and their environments
    "environments.tasks": "Task find_task make_environment task_names",
    "environments.wrappers": "Standard standardise",
    "environments.spaces": "Spaces",
    "environments.episodes": "Episodes",
    # Data: published, made here, or one's own
    "data.dataset": "Dataset ShardedDataset load_dataset load_minari load_npz load_shards",
    "data.generate": "DataConfig generate",
    "data.manifest": "DataError",
    "data.replay": "Batch Replay",
    # Reports of runs, many runs, policies without this package
    "report.command": "Report ReportConfig run_report",
    "sweep": "run_sweep",
    "sweep.config": "Setting SweepConfig",
    "export": "ExportConfig Exported run_export",
    # A training loop of one's own
    "training.agent_loss": "AgentLoss",
    "training.online": "OnlineCollector",
    "training.phases": "Phases",
    # Failures that the command line shows as one line
    "applications.common.errors": "RunError",
}
"""Names of this facade by the file that defines them, in this package unless it says another."""

_HOMES = {name: file for file, names in _FILES.items() for name in names.split()}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    # Train an agent
    from applications.rl.training.config import TrainConfig
    from applications.rl.training.train import Trained, train

    # Evaluate it, and read it back from its run folder
    from applications.rl.evaluation.evaluator import Evaluation, EpisodeEvaluator, evaluate
    from applications.rl.run_folder import TrainedAgent, load_agent

    # Agents and their options
    from applications.rl.agents.registry import AGENTS, agent_name, find_agent, make_agent
    from applications.rl.agents.presets import preset
    from applications.rl.agents.bc import BC, BCConfig
    from applications.rl.agents.qam import QAM, QAMConfig
    from applications.rl.agents.qam_e import QAME, QAMEConfig
    from applications.rl.agents.qam_f import QAMF, QAMFConfig
    from applications.rl.agents.fql import FQL, FQLConfig
    from applications.rl.agents.ifql import IFQL, IFQLConfig
    from applications.rl.agents.bam import BAM, BAMConfig
    from applications.rl.agents.fawac import FAWAC, FAWACConfig
    from applications.rl.agents.fbrac import FBRAC, FBRACConfig
    from applications.rl.agents.cgql import CGQL, CGQLConfig
    from applications.rl.agents.cgql_mse import CGQLMSE, CGQLMSEConfig
    from applications.rl.agents.cgql_linex import CGQLLinex, CGQLLinexConfig
    from applications.rl.agents.rql import RQL, RQLConfig
    from applications.rl.agents.fedit import FEdit, FEditConfig
    from applications.rl.agents.dsrl import DSRL, DSRLConfig
    from applications.rl.agents.qsm import QSM, QSMConfig
    from applications.rl.agents.dac import DAC, DACConfig
    from applications.rl.agents.rebrac import ReBRAC, ReBRACConfig
    from applications.rl.agents.trqam import TRQAM, TRQAMConfig
    from applications.rl.agents.sqam import SQAM, SQAMConfig
    from applications.rl.agents.rlpd import RLPD, RLPDConfig

    # An agent of one's own
    from applications.rl.agents.base import Agent, Shapes, Uniform
    from applications.rl.agents.options import (
        AgentConfig,
        BestOfOptions,
        CriticOptions,
        EntropyOptions,
        MatchingOptions,
        Range,
        TiltOptions,
        above,
        at_least,
        one_of,
        checked_option,
    )
    from applications.rl.agents.networks import (
        Critics,
        DeterministicActor,
        FlowActor,
        OneStepActor,
        TanhGaussianActor,
        TimedCritics,
        ValueNetwork,
    )
    from applications.rl.agents.rollouts import (
        FlowODE,
        Noise,
        best_of,
        candidates,
        condition,
        first_ranked,
        flow_action,
    )
    from applications.rl.agents.losses import (
        Metrics,
        Term,
        behaviour_loss,
        bootstrap,
        critic_loss,
        critic_term,
        expectile_errors,
        expectile_loss,
        one_step_loss,
        pessimistic,
        td_target,
    )
    from applications.rl.agents.losses_gaussian import edit_loss, entropy_loss
    from applications.rl.agents.running_state import RunningState
    from applications.rl.agents.domains import by_domain
    from applications.rl.agents.testing import check_agent

    # Tasks and their environments
    from applications.rl.environments.tasks import Task, find_task, make_environment, task_names
    from applications.rl.environments.wrappers import Standard, standardise
    from applications.rl.environments.spaces import Spaces
    from applications.rl.environments.episodes import Episodes

    # Data: published, made here, or one's own
    from applications.rl.data.dataset import (
        Dataset,
        ShardedDataset,
        load_dataset,
        load_minari,
        load_npz,
        load_shards,
    )
    from applications.rl.data.generate import DataConfig, generate
    from applications.rl.data.manifest import DataError
    from applications.rl.data.replay import Batch, Replay

    # Reports of runs, many runs, policies without this package
    from applications.rl.report.command import Report, ReportConfig, run_report
    from applications.rl.sweep import run_sweep
    from applications.rl.sweep.config import Setting, SweepConfig
    from applications.rl.export import ExportConfig, Exported, run_export

    # A training loop of one's own
    from applications.rl.training.agent_loss import AgentLoss
    from applications.rl.training.online import OnlineCollector
    from applications.rl.training.phases import Phases

    # Failures that the command line shows as one line
    from applications.common.errors import RunError

else:

    def __getattr__(name: str) -> object:
        """Import a name of the facade when it is first used."""
        if name == "__version__":
            return import_module("flows.version").__version__
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        file = _HOMES[name]
        module = file if file.startswith("applications.") else f"{__name__}.{file}"
        value = getattr(import_module(module), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Return the names of the facade, for completion in a shell."""
        return sorted({*globals(), *__all__})
