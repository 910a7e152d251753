"""An agent of one's own, in one file outside the package: behaviour cloning by regression."""

from dataclasses import dataclass

import torch

from applications.rl import Agent, AgentConfig, at_least, checked_option


@dataclass(frozen=True)
class RegressionConfig(AgentConfig):
    """Options of regression."""

    jitter: float = checked_option(0.0, at_least(0.0))
    """Noise on the imitated actions."""


class Regression(Agent):
    """Mean of the data's chunks at an observation."""

    config_class = RegressionConfig
    color = "#a3d977"
    small = {"pointmaze-medium": {"jitter": 0.05}}

    def __init__(self, config, observation_dim, action_dim):
        super().__init__(config, observation_dim, action_dim)
        self.actor = self.one_step_actor()

    def noise_shapes(self, batch_size):
        return {"noise": (batch_size, self.chunk_dim)}

    def act_shapes(self, batch_size):
        return {"noise": (batch_size, self.chunk_dim)}

    def losses(self, batch, noise):
        wanted = self.flatten(batch.actions) + self.config.jitter * noise["noise"]
        error = (self.actor(batch.observations, torch.zeros_like(wanted)) - wanted) ** 2
        loss = (batch.valid[:, None] * error).mean()
        return {"actor": (loss, {"actor/loss": loss.detach()})}

    def chunks(self, observations, noise):
        return self.actor(observations, torch.zeros_like(noise["noise"])).clamp(-1, 1)
