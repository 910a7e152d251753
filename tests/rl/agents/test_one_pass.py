"""The chain of an update and its ODEs, which take their steps together, are what each is alone.

Alone: the chain by the core's `rollout`, the ODEs by the core's sampler, the actions as by `act`.
"""

import itertools

import pytest
import torch
from helpers.agent_problems import B, batch, make, measure, noise

from adjoint.chain.rollout import rollout
from applications.rl.agents.losses import matching_loss
from applications.rl.agents.rollouts import condition
from flows.sampling import sample

CASES = list(
    itertools.product(
        [("qam", {}), ("qam-e", {}), ("qam-f", {}), ("qam-f", {"alpha": 0.0})],
        ("euler", "ab2"),
        ("euler_published", "moment_matched"),
        (1, 3),
        (False, True),
    )
)


def make_case(case, **options):
    (name, own), solver, kernel, best_of_n, residual = case
    options |= {"solver": solver, "kernel": kernel, "best_of_n": best_of_n, "residual": residual}
    agent = make(name, shake=0.4, flow_steps=5, **own, **options)
    data, eps = batch(), noise(agent)
    measure(agent, data, eps)
    return agent, data, eps


def flow(agent, s, x):
    solver = agent.config.solver
    return sample(agent.flow.acting_velocity, x, grid=5, method=solver, cond=condition(s)).clamp(
        -1, 1
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_pass_gives_what_separate_ones_do(case):
    agent, data, eps = make_case(case)
    found = agent.rollouts(data, eps)
    table, s = agent.kernel.on(torch.device("cpu")), data.observations
    alone = rollout(
        agent.flow.velocity,
        agent.flow.reference,
        table,
        eps["sde_x0"],
        eps["sde_eps"],
        condition(s),
    )
    close = {"rtol": 1e-12, "atol": 1e-12}
    assert torch.equal(found.chain.kernel.std, table.std)
    torch.testing.assert_close(found.chain.xs, alone.xs, **close)

    edited, imitated = hasattr(agent, "editor"), getattr(agent, "one_step", None) is not None
    proposals = []
    for i in range(case[3]):
        own = {"noise": eps["next_action_noise"][:, i]}
        own |= {"edit_eps": eps["next_edit_eps"][:, i]} if edited else {}
        chunks = agent.propose(data.next_observations, own)
        if not imitated:  # by hand, for `propose` runs the ODE by the same object
            by_sampler = flow(agent, data.next_observations, own["noise"])
            if edited:
                by_sampler = agent.edit(data.next_observations, by_sampler, own["edit_eps"])
            torch.testing.assert_close(chunks, by_sampler, **close)
        proposals.append(chunks)
    values = [agent.critic(data.next_observations, chunks).mean(0) for chunks in proposals]
    first = torch.stack(values).argmax(0)
    best = torch.stack(proposals)[first, torch.arange(B)]
    torch.testing.assert_close(found.next_actions, best, **close)

    if edited or imitated:
        torch.testing.assert_close(
            found.flow_actions, flow(agent, s, eps["extra_base_noise"]), **close
        )
    else:
        assert found.flow_actions is None
    for tensor in (found.chain.xs, found.next_actions, found.flow_actions):
        assert tensor is None or not tensor.requires_grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_policy_is_evaluated_once_a_step(case):
    """K times for chain and ODEs together, then once with gradient at all states of the chain."""
    agent, data, eps = make_case(case)
    seen = []
    agent.policy.register_forward_hook(
        lambda module, args, out: seen.append((len(args[0]), out.requires_grad))
    )
    agent.loss(data, eps)
    (name, own), _, kernel, best_of_n, _ = case
    rows = B * {"qam": best_of_n, "qam-e": best_of_n + 1, "qam-f": 1}[name]
    if own:  # QAM-F without its one-step policy
        rows = B * best_of_n
    noiseless = kernel == "euler_published"  # then the base moves the chain's last step
    expected = [(B + rows, False)] * 4 + [(rows if noiseless else B + rows, False), (5 * B, True)]
    assert seen == expected


@pytest.mark.parametrize("steps", [3, 7, 10, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chain_and_ode_have_the_same_times(steps, dtype):
    """Bitwise, as the network sees them."""
    agent = make("qam", flow_steps=steps, kernel="moment_matched", dtype=dtype)
    data, eps = batch(dtype=dtype), noise(agent)
    seen = []
    agent.policy.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    agent.rollouts(data, eps)
    together, seen[:] = torch.stack(seen), []
    agent.chunks(data.next_observations, {"noise": eps["next_action_noise"]})
    assert torch.equal(together, torch.stack(seen))


def test_the_chain_of_an_update_is_by_the_error_its_batch_is_part_of():
    agent, other = (make("qam", kernel="moment_matched") for _ in range(2))
    data, eps = batch(), noise(agent)
    _, metrics = agent.loss(data, eps)
    measure(other, data, eps)
    chain = other.rollouts(data, eps).chain
    expected, _ = matching_loss(other.flow, chain, data.observations, other.reward)
    torch.testing.assert_close(metrics["actor/matching_loss"], expected.detach())
