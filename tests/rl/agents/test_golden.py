"""The agents compute what the published implementation computes, number for number.

Everything goes through what training uses: `Agent.loss`, `Agent.follow`, `Agent.update_targets` and
`Agent.act`, driven by `flows.training.trainer.Trainer`, alone or together with others by
`flows.training.stacked.StackedTrainers`; only the noise is the recorded one.  Tolerances are rtol
1e-5 and atol 1e-6, the latter in units of the tensor's largest entry where that exceeds 1: the
smallest entries of a gradient are sums of terms a million times larger, so float32 rounds them by
more.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from helpers.golden_values import (
    ALT,
    BAM,
    CASES,
    CGQL,
    CGQL_LINEX,
    CGQL_MSE,
    DAC,
    DSRL,
    FAWAC,
    FBRAC,
    FEDIT,
    FQL,
    IFQL,
    QAM,
    QAM_E,
    QAM_F,
    QSM,
    REBRAC,
    RESIDUAL,
    TRQAM,
    ours,
)

from applications.rl.agents import make_agent
from applications.rl.agents.bam import differentiable_chain
from applications.rl.agents.diffusion import log_signal, noised
from applications.rl.agents.guidance import noisy_values
from applications.rl.agents.losses import (
    bootstrap,
    chain_adjoint,
    pessimistic,
    td_target,
)
from applications.rl.agents.rollouts import condition
from flows.training.config import TrainerConfig
from flows.training.loss import SplitLoss
from flows.training.stacked import StackedTrainers, draw
from flows.training.trainer import Trainer

RTOL, ATOL = 1e-5, 1e-6
MEMBERS = {"alone": (0,), "together": (1, 0, 2)}
"""Who is trained at once, see `make_trainer`; the golden one is in the middle."""

LOSSES = {  # published metric -> ours
    "critic_loss": "critic/loss",
    "flow_loss": "actor/flow_loss",
    "adj_loss": "actor/matching_loss",
    "fql_distill_loss": "actor/distill_loss",
    "fql_q_loss": "actor/q_loss",
    "info.critic/critic_loss": "critic/loss",
    "info.actor/flow_loss": "actor/flow_loss",
    "info.actor/bc_flow_loss": "actor/flow_loss",
    "info.actor/adj_loss": "actor/matching_loss",
    "info.actor/edit_q_loss": "actor/q_loss",
    "info.actor/edit_entropy": "actor/edit_entropy",
    "info.actor/edit_alpha": "actor/edit_alpha",
    "info.actor/distill_loss": "actor/distill_loss",
    "info.critic/distill_loss": "critic/distill_loss",
    "info.actor/entropy": "actor/entropy",
    "info.actor/alpha": "actor/alpha",
    "info.actor/bam_loss": "actor/path_loss",
    "info.actor/bc_loss": "actor/path_penalty",
    "bc_loss": "actor/denoising_loss",
    "info.value/value_loss": "value/loss",
    "info.critic/value_loss": "value/loss",
    "info.critic/noisy_critic_loss": "critic/noisy_loss",
    "info.value/v_mean": "value/v_mean",
    "info.actor/path_kl": "actor/path_kl",
    "info.dual/kl_budget": "actor/kl_budget",
    "state.kl_ema": "actor/path_kl_average",
    "state.lam": "actor/multiplier",
}
"""IFQL's actor loss is compared below: the name stands for something else elsewhere."""


def check(actual, expected, what):
    scale = max(1.0, float(expected.abs().max()))
    actual = actual.detach().reshape(expected.shape)
    torch.testing.assert_close(
        actual, expected, rtol=RTOL, atol=ATOL * scale, msg=lambda text: f"{what}: {text}"
    )


class Replayed(SplitLoss):
    """The recorded batches and noises as the loss of a trainer, update by update from ``first``."""

    def __init__(self, case, first=0):
        self.case, self.update = case, first

    def sample(self, agent, generator):
        update, self.update = self.update % 3, self.update + 1
        return self.case.batch(update), self.case.noise(update)

    def evaluate(self, agent, inputs):
        return agent.loss(*inputs)

    def follow(self, agent, metrics):
        agent.follow(metrics)

    def before_update(self, agent):
        agent.update_targets()


def make_trainer(case, member=0):
    """A trainer of the case's agent; that of another member has other weights and other batches."""
    agent = case.make()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(1 + 0.3 * member)
    config = TrainerConfig(
        lr=agent.config.lr,
        lr_schedule="constant",
        ema_decay=0.0,
        grad_clip=agent.config.grad_clip,
    )
    return Trainer(agent, Replayed(case, member), config)


@functools.cache
def trained(name, path="alone"):
    """Our agent after the three recorded updates, each of them checked."""
    case = next(case for case in CASES if str(case) == name)
    trainers = [make_trainer(case, member) for member in MEMBERS[path]]
    trainer = trainers[len(trainers) // 2]
    together = StackedTrainers(trainers) if path == "together" else None
    for update in range(3):
        for each in trainers:
            each.zero_grad()
        if together is None:
            trainer.backward()
        else:
            together.backward([draw(each) for each in trainers])
        check_losses(case, update, trainer)
        norms = [each.apply()["grad_norm"] for each in trainers]
        check(norms[len(norms) // 2], case.get(f"u{update}.out.grad_global_norm"), "norm")
        if case.group(f"u{update}.out.params"):
            for name, parameter in case.leaves(trainer.module):
                expected = ours(name, case.get(f"u{update}.out.params.modules_{name}"))
                check(parameter, expected, f"{name} after update {update}")
    return trainer.module


def check_losses(case, update, trainer):
    """Losses and gradients of a trainer that has them, but has not applied them."""
    prefix, (metrics,) = f"u{update}.out", trainer.loss_metrics
    check(metrics["loss"], case.get(f"{prefix}.total_loss"), "total loss")
    compared = [(p, name) for p, name in LOSSES.items() if case.has(f"{prefix}.{p}")]
    if case is REBRAC:  # compared below, for the recording has its weight in it
        compared.remove(("info.actor/bc_loss", "actor/path_penalty"))
    assert compared
    for published, name in compared:
        check(metrics[name], case.get(f"{prefix}.{published}"), published)
    if case.group(f"{prefix}.grad"):
        for name, parameter in case.leaves(trainer.module):
            if parameter.requires_grad:
                expected = ours(name, case.get(f"{prefix}.grad.modules_{name}"))
                check(parameter.grad, expected, f"gradient of {name}")


@pytest.mark.parametrize("path", ["alone", "together"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_updates(case, path):
    trained(str(case), path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_of_the_agent_is_compared(case):
    agent = case.make()
    assert {id(p) for _, p in case.leaves(agent)} == {id(p) for p in agent.parameters()}
    compared = {f"modules_{name}" for name, _ in case.leaves(agent)}
    # Without a use for it there is no target network; the published code keeps one all the same.
    unused = {"target_actor_fast"} | ({"target_actor_slow"} if case is ALT else set())
    published = {
        name
        for name in case.group("params0")
        if name.split("/")[0][len("modules_") :] not in unused
    }
    assert compared == published


@pytest.mark.parametrize("case", [QAM, ALT, RESIDUAL, QAM_F, QAM_E, TRQAM], ids=str)
def test_trajectory_and_adjoint(case):
    agent, batch, noise = case.make(), case.batch(0), case.noise(0)
    chain = agent.rollouts(batch, noise).chain
    check(chain.xs[:-1], case.get("u0.out.xs"), "states")
    adjoint = chain_adjoint(agent.flow, chain, batch.observations, agent.reward).values
    check(adjoint[:-1], case.get("u0.out.adjs"), "adjoints")
    terminal = adjoint[-1].abs()
    prefix = "u0.out" if case.has("u0.out.adj_max") else "u0.out.info.actor"
    separator = "." if case.has("u0.out.adj_max") else "/"
    check(terminal.amax(), case.get(f"{prefix}{separator}adj_max"), "largest gradient")
    check(terminal.mean(), case.get(f"{prefix}{separator}adj_mean"), "mean gradient")


@pytest.mark.parametrize("case", [c for c in CASES if c is not IFQL], ids=str)
def test_next_actions_and_values(case):
    agent, batch, noise = case.make(), case.batch(0), case.noise(0)
    if case is REBRAC:
        chunks = agent.next_actions(batch, noise)
    elif not hasattr(agent, "rollouts"):
        own = {"noise": noise["next_action_noise"]}
        own |= {"ddpm_z": noise["next_ddpm_z"]} if "next_ddpm_z" in noise else {}
        chunks = agent.chunks(batch.next_observations, own)
    else:
        chunks = agent.rollouts(batch, noise)[0]
    check(chunks, case.get("u0.out.next_actions"), "next actions")
    values = agent.target_critic(batch.next_observations, chunks)
    check(values, case.get("u0.out.next_qs"), "values of the next actions")
    discount = agent.config.discount**3
    assert agent.config.discount == (0.995 if case is TRQAM else 0.99)
    next_value = pessimistic(case.get("u0.out.next_qs"), agent.config.rho)
    expected = batch.rewards + discount * batch.masks * next_value
    config = agent.config
    target = td_target(agent.target_critic, batch, chunks, config.window_discount, config.rho)
    check(target, expected, "target")
    if case.has("u0.out.target_q"):
        check(target, case.get("u0.out.target_q"), "target")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_the_data(case):
    agent, batch = case.make(), case.batch(0)
    q = agent.critic(batch.observations, agent.flatten(batch.actions))
    check(q, case.get("u0.out.q"), "values")


@pytest.mark.parametrize("case", [c for c in CASES if c.file != "golden_qam"], ids=str)
@pytest.mark.parametrize("kind", ["single", "batch", "bon4"])
def test_actions_after_three_updates(case, kind):
    if not case.has(f"eval_{kind}.in.observations"):
        assert case is IFQL or (case in (FAWAC, QSM, DAC, REBRAC) and kind == "bon4")
        return
    agent = trained(str(case))
    observations, noise = case.acting(kind)
    if kind == "bon4":
        four = replace(agent.config, best_of_n=4)
        state, agent = agent.state_dict(), make_agent(four, 6, 2)
        agent.load_state_dict(state)
    actions = agent.act(observations, noise)
    assert actions.shape == (len(observations), 3, 2)
    check(actions.flatten(1), case.get(f"eval_{kind}.out.actions"), "actions")


@pytest.mark.parametrize("case", [QAM_E, FEDIT], ids=str)
def test_parts_of_an_edit(case):
    agent, batch, noise = case.make(), case.batch(0), case.noise(0)
    s = batch.observations
    flow = agent.rollouts(batch, noise)[-1]
    check(flow, case.get("u0.out.flow_actions"), "flow actions")
    inputs = torch.cat([s, flow], dim=1)
    mean, log_std = agent.editor(inputs)
    check(mean, case.get("u0.out.edit_mean"), "mean of the edit")
    check(log_std.exp(), case.get("u0.out.edit_std"), "deviation of the edit")
    edit, log_prob = agent.editor.sample(inputs, noise["edit_eps"])
    check(edit, case.get("u0.out.edit"), "edit")
    check(log_prob, case.get("u0.out.edit_log_probs"), "log-probability of the edit")
    _, metrics = agent.losses(batch, noise)["edit"]
    alpha, entropy = metrics["actor/edit_alpha"], metrics["actor/edit_entropy"]
    check(-alpha * entropy, case.get("u0.out.info.actor/edit_entropy_loss"), "entropy loss")
    check(alpha * (entropy + 3), case.get("u0.out.info.actor/edit_alpha_loss"), "α's loss")


def test_parts_of_fql():
    agent, batch, noise = FQL.make(), FQL.batch(0), FQL.noise(0)
    z = noise["distill_noise"]
    _, flow = agent.rollouts(batch, noise)
    check(flow, FQL.get("u0.out.flow_actions"), "flow actions")
    g = agent.one_step(batch.observations, z)
    check(g, FQL.get("u0.out.onestep_actions"), "one-step actions")


def test_parts_of_ifql():
    agent, batch, noise = IFQL.make(), IFQL.batch(0), IFQL.noise(0)
    check(agent.value(batch.observations), IFQL.get("u0.out.v"), "value")
    next_value = agent.value(batch.next_observations)
    check(next_value, IFQL.get("u0.out.next_v"), "next value")
    check(
        bootstrap(batch, next_value, agent.config.window_discount),
        IFQL.get("u0.out.target_q"),
        "target",
    )
    _, metrics = agent.loss(batch, noise)
    check(metrics["actor/flow_loss"], IFQL.get("u0.out.info.actor/actor_loss"), "actor loss")


def test_parts_of_dsrl():
    agent, batch, noise = DSRL.make(), DSRL.batch(0), DSRL.noise(0)
    s, n = batch.observations, noise["distill_noise"]
    latents = agent.latents(batch.next_observations, noise["next_latent_eps"][:, 0])
    check(latents, DSRL.get("u0.out.next_latents")[:, 0], "next latents")
    _, decoded = agent.rollouts(batch, noise)
    check(decoded, DSRL.get("u0.out.distill_actions"), "decoded actions")
    check(agent.critic(s, decoded), DSRL.get("u0.out.distill_target_qs"), "their values")
    check(agent.latent_critic(s, n), DSRL.get("u0.out.z_qs_distill"), "values of noise")
    z, log_prob = agent.actor.sample(s, noise["latent_eps"])
    check(z, DSRL.get("u0.out.latent"), "latent")
    check(log_prob, DSRL.get("u0.out.latent_log_probs"), "its log-probability")
    check(agent.latent_critic(s, z), DSRL.get("u0.out.z_qs_actor"), "values of latents")
    terms = agent.losses(batch, noise)
    alpha = terms["entropy"][1]["actor/alpha"]
    actor = terms["actor"][0] + alpha * log_prob.mean()
    check(actor, DSRL.get("u0.out.info.actor/actor_loss"), "the actor's loss")
    check(actor + alpha * (3 - log_prob.mean()), sum_of_actor(DSRL), "loss of actor and α")


def sum_of_actor(case):
    return sum(case.get(f"u0.out.info.actor/{name}") for name in ("actor_loss", "alpha_loss"))


def test_parts_of_rebrac():
    agent, batch, noise = REBRAC.make(), REBRAC.batch(0), REBRAC.noise(0)
    s = batch.observations
    next_mode = agent.target_actor(batch.next_observations)
    check(next_mode, REBRAC.get("u0.out.next_mode"), "actions of the target policy")
    check(agent.actor(s), REBRAC.get("u0.out.actor_actions"), "actions")
    check(agent.critic(s, agent.actor(s)), REBRAC.get("u0.out.actor_qs"), "their values")
    loss, metrics = agent.losses(batch, noise)["actor"]
    check(loss, REBRAC.get("u0.out.info.actor/total_loss"), "the actor's loss")
    imitation = agent.config.alpha * metrics["actor/bc_loss"]
    check(imitation, REBRAC.get("u0.out.info.actor/bc_loss"), "imitation")


@pytest.mark.parametrize("update", range(3))
def test_target_networks_of_rebrac_move_where_the_recording_says(update):
    agent = REBRAC.make()
    for _ in range(update):
        agent.update_targets()
    before = [p.clone() for p in agent.target_actor.parameters()]
    agent.update_targets()
    moved = not all(map(torch.equal, agent.target_actor.parameters(), before))
    assert moved == REBRAC.get(f"u{update}.in.full_update").item()


def test_parts_of_bam():
    agent, batch, noise = BAM.make(), BAM.batch(0), BAM.noise(0)
    kernel = agent.kernel.on(torch.device("cpu"))
    xs, _ = differentiable_chain(agent.flow, kernel, batch.observations, noise)
    check(xs, BAM.get("u0.out.sde_xs"), "states")
    values = agent.critic(batch.observations, xs[-1])
    check(values, BAM.get("u0.out.bam_qs"), "values of the end")


def test_parts_of_fawac():
    agent, batch, noise = FAWAC.make(), FAWAC.batch(0), FAWAC.noise(0)
    s, actions = batch.observations, agent.flatten(batch.actions)
    v = agent.value(s)
    check(v, FAWAC.get("u0.out.v"), "value")
    check(agent.target_critic(s, actions), FAWAC.get("u0.out.target_qs"), "values it is fitted to")
    weight = (10 * (agent.critic(s, actions).mean(0) - v)).exp()
    published = FAWAC.get("u0.out.awr_weight_unclipped")
    torch.testing.assert_close(weight.detach(), published, rtol=1e-4, atol=0)  # 1e-5 of τ advantage
    assert published.max() > 100 > published.min()
    _, metrics = agent.loss(batch, noise)
    check(metrics["actor/weight"], published.clamp(max=100).mean(), "weight")
    check(metrics["actor/flow_loss"], FAWAC.get("u0.out.info.actor/actor_loss"), "actor loss")


def test_parts_of_fbrac():
    agent, batch, noise = FBRAC.make(), FBRAC.batch(0), FBRAC.noise(0)
    own = agent.propose(batch.observations, {"noise": noise["bptt_noise"]})
    check(own, FBRAC.get("u0.out.actor_actions"), "own actions")
    assert own.requires_grad
    check(agent.critic(batch.observations, own), FBRAC.get("u0.out.actor_qs"), "their values")
    terms = agent.losses(batch, noise)
    total = terms["behaviour"][0] + terms["value"][0]
    check(total, FBRAC.get("u0.out.info.actor/actor_loss"), "actor loss")


@pytest.mark.parametrize("case", [QSM, DAC], ids=str)
def test_parts_of_diffusions(case):
    agent, batch, noise = case.make(), case.batch(0), case.noise(0)
    levels = [math.exp(log_signal(t / 10)) for t in range(11)]
    check(torch.tensor(levels), case.get("const.alpha_hats"), "signal levels")
    x, t, deviation = noised(agent.flatten(batch.actions), noise, 10)
    check(t, case.get("u0.noise.actor_t").float(), "steps")
    check(x, case.get("u0.out.noisy_actions"), "noised actions")
    predicted = agent.policy(x, t, batch.observations)
    check(predicted, case.get("u0.out.eps_pred"), "predicted noise")
    x.requires_grad_(True)
    q = agent.target_critic(batch.observations, x).mean(0).sum()
    (gradient,) = torch.autograd.grad(q, x)
    check(gradient, case.get("u0.out.q_grad"), "gradient of the critics")
    guided = deviation * gradient * predicted
    if case is QSM:
        guided = (-10 * gradient - predicted).square()
    guidance = guided.mean(1)
    check(guidance, case.get("u0.out.actor_per_sample"), "guidance")
    _, metrics = agent.losses(batch, noise)["policy"]
    weighted = (guidance * batch.valid).mean() + (1 - batch.valid).mean()
    check(metrics["actor/guidance_loss"], weighted.detach(), "a window of weight 0 counts 1")
    weighted -= (1 - batch.valid).mean()
    check(weighted, case.get("u0.out.actor_loss_if_masked_by_product"), "weighted guidance")


@pytest.mark.parametrize("case", [CGQL, CGQL_MSE, CGQL_LINEX], ids=str)
def test_parts_of_cgql(case):
    agent, batch, noise = case.make(), case.batch(0), case.noise(0)
    states, scores = case.get("u0.out.next_flow_traj"), case.get("u0.out.next_scores")
    s, flow, x = batch.next_observations, agent.flow, states[:, :, 0]
    for k in range(1, 10):
        t = torch.tensor(k / 10)
        found = agent.critic.action_gradient(s, x[k], t if flow.noisy else 1.0)
        check(found, scores[k - 1, :, 0], f"gradient of step {k}")
        check(x[k] + flow.velocity(x[k], t, condition(s)) / 10, x[k + 1], f"state after step {k}")
    action = agent.propose(s, {"noise": noise["next_action_noise"][:, 0]})
    check(action, case.get("u0.out.next_flow_actions"), "actions")
    if case is not CGQL:
        actions = agent.flatten(batch.actions)
        noisy = noisy_values(agent.critic, agent.target_critic, batch.observations, actions, noise)
        check(noisy.values, case.get("u0.out.noisy_q"), "noisy values")
        check(noisy.targets, case.get("u0.out.noisy_target_q"), "their targets")
