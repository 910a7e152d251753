"""Trainings that tests/rl/training/test_killed.py kills: offline, and offline then online."""

import torch

from applications.rl import TrainConfig, train
from helpers.tiny import Corridor, corridor_data, options

OFFLINE = {"offline_steps": 150, "online_steps": 0}
ONLINE = {"offline_steps": 15, "online_steps": 160, "start_training": 30}


def configuration(folder, phases, **changes):
    base = {
        "task": "corridor",
        "agent": "qam",
        "options": options("qam", horizon=3, discount=0.9),
        "batch_size": 16,
        "eval_every": 20,
        "eval_episodes": 3,
        "environments": 2,
        "checkpoint_every": 7,
        "log_every": 3,
        "folder": folder,
        "resume": True,
        "device": "cpu",
    }
    return TrainConfig(**(base | phases | changes))


def train_offline(folder, report):
    torch.set_num_threads(1)
    config = configuration(folder, OFFLINE)
    train(config, environment=Corridor, dataset=corridor_data(), callbacks=[report])


def train_online(folder, report):
    torch.set_num_threads(1)
    config = configuration(folder, ONLINE)
    train(config, environment=Corridor, dataset=corridor_data(), callbacks=[report])
