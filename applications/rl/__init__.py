"""Offline and online reinforcement learning by adjoint matching; the critic is the reward."""
