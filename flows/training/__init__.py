"""The training loop, with callbacks, checkpoints, several seeds and several processes.

`fit_flow` is one call; `Trainer` is the loop for a loss of one's own.
"""

# The loop and its options
from flows.training.config import TrainerConfig, check_types, learning_rate
from flows.training.loss import Loss, LossFunction, SplitLoss
from flows.training.trainer import Trainer
from flows.training.trainer_checkpoint import Identity
from flows.training.divergence import TrainingDiverged

# Fitting a flow to samples
from flows.training.fit import COUPLINGS, Sampler, data_sampler, fit_flow

# Callbacks: progress bars, loggers, and a clean stop
from flows.training.callbacks import (
    Callback,
    StopTraining,
    Training,
    ProgressBar,
    check_callbacks,
    default_callbacks,
)
from flows.training.loggers import CSVLogger, JSONLLogger, TensorBoardLogger

# Files that survive a kill
from flows.training.checkpoint import (
    CheckpointError,
    ensure_writable,
    finite,
    replacing,
    versions,
    write_json,
)

# Several trainings as one, and CUDA graphs
from flows.training.stacked import StackedTrainers, train_stacked
from flows.training.update_graph import UpdateGraph, check_recordable
from flows.training.gradient_graph import GradientGraph

# Processes and devices
from flows.training.runtime import choose_device, prepare_process

__all__ = [
    # The loop and its options
    "TrainerConfig",
    "check_types",
    "learning_rate",
    "Loss",
    "LossFunction",
    "SplitLoss",
    "Identity",
    "Trainer",
    "TrainingDiverged",
    # Fitting a flow to samples
    "COUPLINGS",
    "Sampler",
    "data_sampler",
    "fit_flow",
    # Callbacks: progress bars, loggers, and a clean stop
    "Callback",
    "StopTraining",
    "Training",
    "CSVLogger",
    "JSONLLogger",
    "ProgressBar",
    "TensorBoardLogger",
    "check_callbacks",
    "default_callbacks",
    # Files that survive a kill
    "CheckpointError",
    "ensure_writable",
    "finite",
    "replacing",
    "versions",
    "write_json",
    # Several trainings as one, and CUDA graphs
    "StackedTrainers",
    "train_stacked",
    "UpdateGraph",
    "GradientGraph",
    "check_recordable",
    # Processes and devices
    "choose_device",
    "prepare_process",
]
