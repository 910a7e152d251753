"""Training against the protocol written out by hand, and what must stop it."""

import csv
import json
import math
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.killed_rl import OFFLINE, ONLINE, configuration
from helpers.tiny import Bandit, Corridor, bandit_data, corridor_data, options
from torch import nn

from applications.rl import (
    AgentLoss,
    Episodes,
    Phases,
    Replay,
    RunError,
    TrainConfig,
    evaluate,
    load_agent,
    make_agent,
    standardise,
    train,
)
from applications.rl.environments.reproducible import episode_seed
from applications.rl.run_folder import full_disk_explained
from applications.rl.training.callbacks import WandbLogger
from applications.rl.training.setup import ShardRotation
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.checkpoint import CheckpointError
from flows.training.divergence import TrainingDiverged

torch.set_num_threads(1)


def fit(folder, phases=OFFLINE, *, callbacks=(), **changes):
    """The runs of a training in the corridor."""
    config = configuration(folder, phases, **changes)
    return train(config, environment=Corridor, dataset=corridor_data(), callbacks=callbacks)


def rows(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def assert_equal_weights(a, b, **tolerance):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=name)


EXACT = {"rtol": 0, "atol": 0}


# --- the protocol ---------------------------------------------------------------------------------


def by_hand(config, seed):
    """Weights and online transitions of the protocol of the published method, written out."""
    chunk, data = config.options, corridor_data()
    agent = make_agent(chunk, 4, 2, seed=seed)
    agent.fit_normalizer(torch.as_tensor(data.observations))
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in agent.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=chunk.lr, betas=(0.9, 0.999), eps=1e-8)
    replay = Replay.from_dataset(data, config.online_steps)

    def update():
        batch = replay.sample(
            config.batch_size, horizon=3, discount=chunk.discount, generator=generator
        )
        loss, _ = agent.loss(batch, agent.draw_noise(config.batch_size, generator))
        gradients = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert norm > 1  # so that the clip acts
        for p, g in zip(trained, gradients, strict=True):
            p.grad = g / norm
        agent.update_targets()
        adam.step()

    for _ in range(config.offline_steps):
        update()
    environment, episode, queue, came = standardise(Corridor()), 0, [], []
    run_seed = episode_seed(seed, 2)
    observation, _ = environment.reset(seed=episode_seed(run_seed, 0))
    for step in range(1, config.online_steps + 1):
        if not queue:
            queue = [*agent.act(torch.from_numpy(observation)[None], generator)[0].numpy()]
        action = queue.pop(0)
        following, reward, terminated, truncated, _ = environment.step(action)
        done = terminated or truncated
        came.append((observation, action, reward, 1 - terminated, done, following))
        replay.add(*came[-1])
        observation = following
        if done:
            episode, queue = episode + 1, []
            observation, _ = environment.reset(seed=episode_seed(run_seed, episode))
        if step >= config.start_training:
            update()
    return agent, came


@pytest.mark.slow
def test_offline_to_online_is_the_protocol(tmp_path):
    (run,) = fit(tmp_path, ONLINE, seeds=(4,), eval_every=0)
    agent, came = by_hand(configuration(tmp_path, ONLINE), 4)
    assert_equal_weights(run.agent, agent, rtol=1e-4, atol=1e-6)
    online = checkpoints.load(run.folder / "checkpoint.pt")["loss"]["replay"]
    for values, column in zip(online.values(), zip(*came, strict=True), strict=True):
        expected = torch.as_tensor(np.array(column, np.float32))
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)
    assert 0 < online["masks"].sum() < online["terminals"].logical_not().sum() + len(came)
    assert {0.0, 1.0} == set(online["terminals"].tolist())


@pytest.mark.slow
def test_evaluating_changes_nothing_of_the_training(tmp_path):
    (plain,) = fit(tmp_path / "a", ONLINE, eval_every=0)
    (watched,) = fit(tmp_path / "b", ONLINE, eval_every=7)
    assert_equal_weights(plain.agent, watched.agent, **EXACT)


@pytest.mark.slow
def test_one_seed_gives_one_result_and_several_seeds_are_as_if_alone(tmp_path):
    both = fit(tmp_path / "both", ONLINE, seeds=(3, 1))
    (alone,) = fit(tmp_path / "alone", ONLINE, seeds=(1,), workers=0, environments=1)
    assert_equal_weights(both[1].agent, alone.agent, **EXACT)
    for name in ("metrics.csv", "evaluation.csv"):
        assert (both[1].folder / name).read_bytes() == (alone.folder / name).read_bytes()
    assert both[1].evaluation == alone.evaluation
    assert (both[0].folder / "metrics.csv").read_bytes() != (
        alone.folder / "metrics.csv"
    ).read_bytes()


def test_target_networks_follow_the_weights_from_before_the_step(tmp_path):
    """After one update they have not moved, being equal to the weights of before."""
    (run,) = fit(tmp_path, {"offline_steps": 1, "online_steps": 0}, eval_every=0)
    start = make_agent(options("qam", horizon=3, discount=0.9), 4, 2, seed=0)
    pairs = (
        ("target_critic", True),
        ("critic", False),
        ("target_behaviour", True),
        ("behaviour", False),
    )
    for name, same in pairs:
        a, b = (
            nn.utils.parameters_to_vector(getattr(x, name).parameters()) for x in (run.agent, start)
        )
        assert torch.allclose(a, b, rtol=0, atol=1e-8) == same, name


def test_phases_against_counting():
    phases = Phases(offline_steps=7, online_steps=20, start_training=6)
    expected = [(i, 0, "offline") for i in range(1, 8)]
    expected += [(7 + step, step, "online") for step in range(6, 21)]
    updates = range(1, phases.updates + 1)
    assert [(phases.step(u), phases.online(u), phases.phase(u)) for u in updates] == expected
    assert Phases(5).updates == 5
    for arguments in ((-1,), (0, -1), (0, 5, 0), (0, 5, 6)):
        with pytest.raises(ValueError, match=r"(must be at least|must be 0 or at least)"):
            Phases(*arguments)


def test_learning_online_without_data(tmp_path):
    phases = {"offline_steps": 0, "online_steps": 40, "start_training": 10}
    config = configuration(tmp_path, phases, use_data=False)
    (run,) = train(config, environment=Corridor)
    state = checkpoints.load(run.folder / "checkpoint.pt")
    assert state["iteration"] == 31
    assert len(state["loss"]["replay"]["rewards"]) == 40
    assert {row["phase"] for row in rows(run.folder / "evaluation.csv")} == {"online"}


def test_shards_take_turns_and_a_resumed_run_finds_its_own(tmp_path):
    shards = [corridor_data(rows=60, seed=seed) for seed in range(3)]
    replay = Replay.from_dataset(shards[0])
    rotation, seen = ShardRotation(replay, shards, every=4), []
    for update in range(1, 19):
        rotation(update)
        first = replay.windows(torch.tensor([0]), horizon=1, discount=1.0).observations[0].numpy()
        seen.append(
            next(i for i, s in enumerate(shards) if np.array_equal(s.observations[0], first))
        )
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1]
    again = ShardRotation(Replay.from_dataset(shards[0]), shards, every=4)
    again(9)
    assert again.current == 2


@pytest.mark.slow
def test_a_policy_learns_what_its_data_do_not_do(tmp_path):
    """Half of the bandit's data have a reward below 0; cloning keeps that half, others leave it."""
    found = {}
    for name, changes in (
        ("bc", {}),
        ("qam", {"inverse_temperature": 10.0}),
        ("rql", {"alpha": 0.1, "target_policy_rate": 0.05}),
    ):
        config = TrainConfig(
            task="bandit",
            agent=name,
            options=options(name, hidden=(32, 32), horizon=1, lr=3e-3, **changes),
            offline_steps=500,
            batch_size=128,
            eval_every=0,
            folder=tmp_path / name,
            device="cpu",
        )
        (run,) = train(config, environment=Bandit, dataset=bandit_data())
        found[name] = evaluate(run.agent, Bandit, episodes=100, seed=1, environments=8)
    assert 0.35 < found["bc"].success < 0.65
    for name in ("qam", "rql"):
        assert found[name].success > 0.9, name
        assert found[name].mean_return > found["bc"].mean_return + 0.4, name


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_folder_of_a_run(tmp_path):
    (run,) = fit(tmp_path, ONLINE, tensorboard=True)
    assert run.folder == tmp_path / "seed0"
    evaluations = rows(run.folder / "evaluation.csv")
    places = [(int(row["step"]), row["phase"]) for row in evaluations]
    # every 20 steps, and at the end of each phase; none while the first 30 steps are taken
    assert places == [(15, "offline"), *((s, "online") for s in (60, 80, 100, 120, 140, 160, 175))]
    last = evaluations[-1]
    assert float(last["success"]) == pytest.approx(run.evaluation.success)
    assert float(last["return"]) == pytest.approx(run.evaluation.mean_return)
    assert {row["episodes"] for row in evaluations} == {"3"}

    metrics = rows(run.folder / "metrics.csv")
    assert [int(row["iteration"]) for row in metrics] == [*range(3, 147, 3), 146]
    assert float(metrics[-1]["step"]) == 175
    assert {"critic/loss", "actor/matching_loss", "online/return", "grad_norm"} <= {*metrics[0]}

    config = json.loads((run.folder / "config.json").read_text())
    assert (config["task"], config["agent"], config["seed"]) == ("corridor", "qam", 0)
    assert config["options"]["horizon"] == 3
    assert (config["observation_dim"], config["action_dim"]) == (4, 2)
    assert {"torch", "mujoco", "ogbench", "numpy"} <= {*config["versions"]}
    assert config["dataset"]["transitions"] == len(corridor_data())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run.folder / "tensorboard"
    points = EventAccumulator(str(folder / "evaluation")).Reload().Scalars("evaluation/success")
    expected = [float(row["success"]) for row in evaluations]
    assert [point.value for point in points] == pytest.approx(expected)
    points = EventAccumulator(str(folder / "training")).Reload().Scalars("critic/loss")
    assert [point.step for point in points] == [int(row["iteration"]) for row in metrics]


@pytest.mark.slow
def test_an_agent_is_read_back_from_its_run(tmp_path):
    (run,) = fit(tmp_path, eval_every=0)
    for path in (run.folder, run.folder / "checkpoint.pt"):
        trained = load_agent(path)
        assert (trained.name, trained.task, trained.updates) == ("qam", "corridor", 150)
        assert trained.agent.config == run.agent.config
        assert not trained.agent.training
        assert_equal_weights(trained.agent, run.agent, **EXACT)
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no"):
        load_agent(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"name a run below it, such as .*seed0$"):
        load_agent(tmp_path)
    checkpoints.save(tmp_path / "other.pt", {"identity": {"target": "ring"}, "module": {}})
    with pytest.raises(CheckpointError, match="no checkpoint of an agent"):
        load_agent(tmp_path / "other.pt")


@pytest.mark.slow
def test_wandb_gets_metrics_and_evaluations(tmp_path, monkeypatch):
    class Module:
        def __init__(self):
            self.sent, self.finished = [], False

        def init(self, **options):
            self.options = options
            return self

        def define_metric(self, name, step_metric=None):
            self.axes = getattr(self, "axes", {}) | {name: step_metric}

        def log(self, values, step=None):
            self.sent.append((step, values))

        def finish(self):
            self.finished = True

    module, axis = Module(), "evaluation/iteration"
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    fit(tmp_path, wandb="project")
    assert module.options["project"] == "project"
    assert module.options["config"]["options"]["horizon"] == 3
    assert [step for step, values in module.sent if "critic/loss" in values] == [*range(3, 151, 3)]
    evaluated = [20, 40, 60, 80, 100, 120, 140, 150]
    assert sum("evaluation/success" in values for _, values in module.sent) == len(evaluated)
    assert module.axes == {axis: None, "evaluation/*": axis}
    assert [values[axis] for _, values in module.sent if axis in values] == evaluated
    assert module.finished
    assert module.options["resume"] == "never"
    identity = module.options["id"]
    fit(tmp_path, wandb="project")
    assert (module.options["id"], module.options["resume"]) == (identity, "allow")
    fit(tmp_path, wandb="project", resume=False, overwrite=True)  # another run of the same name
    assert module.options["id"] != identity
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        WandbLogger("project", "name", tmp_path / "id", {}, 1).on_start(None)


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [8, 15, 16, 60])
@pytest.mark.slow
def test_more_steps_continue_a_run(tmp_path, stop):
    """Stopped after ``stop`` updates, offline or online, and given the rest of its steps."""
    (whole,) = fit(tmp_path / "whole", ONLINE, eval_every=0)
    online = max(0, stop - 15)
    short = {"offline_steps": min(stop, 15), "online_steps": online and 29 + online}
    fit(tmp_path / "parts", ONLINE | short, eval_every=0)
    (rest,) = fit(tmp_path / "parts", ONLINE, eval_every=0)
    assert_equal_weights(whole.agent, rest.agent, **EXACT)


@pytest.mark.slow
def test_a_maze_of_ogbench_resumes_in_the_midst_of_an_episode(tmp_path):
    pytest.importorskip("ogbench")

    def run(folder, steps):
        phases = {"offline_steps": 0, "online_steps": steps, "start_training": 5}
        changes = {"task": "pointmaze-medium-navigate-singletask-task1-v0", "eval_every": 0}
        return train(configuration(folder, phases, use_data=False, **changes))[0]

    whole = run(tmp_path / "whole", 40)
    run(tmp_path / "parts", 17)
    assert_equal_weights(run(tmp_path / "parts", 40).agent, whole.agent, **EXACT)


@pytest.mark.slow
def test_the_past_cannot_be_changed(tmp_path):
    fit(tmp_path, ONLINE, eval_every=0)
    with pytest.raises(
        CheckpointError, match="after 146 updates, offline_steps and start_training"
    ):
        fit(tmp_path, ONLINE | {"offline_steps": 20}, eval_every=0)
    with pytest.raises(CheckpointError, match="of the online phase, but online_steps is 0"):
        fit(tmp_path, OFFLINE | {"offline_steps": 500}, eval_every=0)
    with pytest.raises(CheckpointError, match="146 updates are done already"):
        fit(tmp_path, ONLINE | {"online_steps": 100}, eval_every=0)
    other = options("qam", horizon=3, discount=0.9, inverse_temperature=3.0)
    with pytest.raises(CheckpointError, match=r"options\.inverse_temperature: 1\.0 in the check"):
        fit(tmp_path, ONLINE, options=other, eval_every=0)
    with pytest.raises(CheckpointError, match=r"batch_size: 16 in the checkpoint, expected 32"):
        fit(tmp_path, ONLINE, batch_size=32, eval_every=0)


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "masks", "terminals"])
def test_a_run_does_not_go_on_with_other_data_of_the_same_length(tmp_path, name):
    fit(tmp_path, OFFLINE | {"offline_steps": 2}, eval_every=0)
    changed = getattr(corridor_data(), name).copy()
    changed[7] = 0.5
    other = replace(corridor_data(), **{name: changed})
    config = configuration(tmp_path, OFFLINE | {"offline_steps": 4}, eval_every=0)
    with pytest.raises(CheckpointError, match=r"data: '[0-9a-f]{16}' in the checkpoint, expected"):
        train(config, environment=Corridor, dataset=other)
    (run,) = train(config, environment=Corridor, dataset=replace(corridor_data(), source="moved"))
    assert checkpoints.load(run.folder / "checkpoint.pt")["iteration"] == 4


@pytest.mark.parametrize("name", ["own.csv", "own"])
def test_a_file_of_another_kind_is_not_taken_for_a_folder(tmp_path, name):
    config = configuration(tmp_path / "runs", OFFLINE, data=tmp_path / name)
    config = replace(config, task="pointmaze-medium-navigate-singletask-task1-v0")
    if name == "own":
        (tmp_path / name).write_text("1,2,3")
    with pytest.raises(
        ValueError, match=rf"data must be a folder or an \.npz file, got .*/{name}'"
    ):
        train(config, environment=Corridor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "callbacks", "match"),
    [
        ({"batch_size": 1.5}, (), "batch_size must be of type int"),
        ({}, [Callback], "callbacks must"),
    ],
)
def test_a_run_is_not_deleted_before_all_is_checked(tmp_path, changes, callbacks, match):
    run = fit(tmp_path)[0]
    before = (run.folder / "checkpoint.pt").read_bytes()
    with pytest.raises(TypeError, match=match):
        fit(tmp_path, resume=False, overwrite=True, callbacks=callbacks, **changes)
    assert (run.folder / "checkpoint.pt").read_bytes() == before


def test_a_run_is_not_overwritten_by_mistake(tmp_path):
    (first,) = fit(tmp_path, eval_every=0, offline_steps=3)
    content = (first.folder / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; --resume continues it, --overwrite"):
        fit(tmp_path, eval_every=0, resume=False, seeds=(7, 0))
    assert (first.folder / "checkpoint.pt").read_bytes() == content
    assert not (tmp_path / "seed7" / "checkpoint.pt").exists()
    changed = options("qam", horizon=1)
    fit(tmp_path, eval_every=0, offline_steps=5, resume=False, overwrite=True, options=changed)
    assert checkpoints.load(first.folder / "checkpoint.pt")["iteration"] == 5


# --- what must stop it ----------------------------------------------------------------------------


@pytest.mark.slow
def test_nan_keeps_the_last_good_checkpoint(tmp_path):
    class Poison(Callback):
        def on_step(self, trainer, iteration, metrics):
            if iteration == 25:
                next(trainer.module.parameters()).data.fill_(math.nan)

    with pytest.raises(TrainingDiverged, match=r"nan in iteration 26.*\(iteration 21\)"):
        fit(tmp_path / "a", callbacks=[Poison()])
    assert checkpoints.load(tmp_path / "a" / "seed0" / "checkpoint.pt")["iteration"] == 21
    (resumed,) = fit(tmp_path / "a")
    (whole,) = fit(tmp_path / "b")
    assert_equal_weights(resumed.agent, whole.agent, **EXACT)


@contextmanager
def files_limited_to(size):
    """Have the kernel refuse longer files, as it does on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
def test_two_trainings_in_one_folder_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    (run,) = fit(tmp_path)
    before = {path.name: path.read_bytes() for path in run.folder.glob("*.*")}

    class Second(Callback):
        """Starts the training once more while it goes on."""

        def on_start(self, trainer):
            match = f"folder: {run.folder} is in use by another training"
            with pytest.raises(RunError, match=match):
                fit(tmp_path, resume=False, overwrite=True)

    fit(tmp_path, resume=False, overwrite=True, callbacks=[Second()])
    assert {path.name: path.read_bytes() for path in run.folder.glob("*.*")} == before


@pytest.mark.slow
def test_a_full_disk_loses_no_run(tmp_path):
    """The disk is full for a checkpoint that has grown by what came online."""
    (whole,) = fit(tmp_path / "whole", ONLINE)
    size = (whole.folder / "checkpoint.pt").stat().st_size
    message = r"File too large; free some space, then --resume continues from .*checkpoint\.pt"
    with files_limited_to(size - 2000), pytest.raises(OSError, match=message):
        fit(tmp_path / "full", ONLINE)
    folder = tmp_path / "full" / "seed0"
    assert 0 < checkpoints.load(folder / "checkpoint.pt")["iteration"] < 146
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        p.name for p in whole.folder.iterdir()
    )
    (resumed,) = fit(tmp_path / "full", ONLINE)
    assert_equal_weights(resumed.agent, whole.agent, **EXACT)
    for name in ("metrics.csv", "evaluation.csv"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("numbers", [30_000, 3_000_000])  # PyTorch writes the larger in its own way
def test_a_full_disk_is_named_as_such(tmp_path, numbers):
    path = tmp_path / "checkpoint.pt"
    message = r"File too large; no checkpoint had been written"
    with (
        files_limited_to(100_000),
        pytest.raises(OSError, match=message),
        full_disk_explained(tmp_path),
    ):
        checkpoints.save(path, {"x": torch.zeros(numbers)})
    with pytest.raises(RuntimeError, match="something else"), full_disk_explained(tmp_path):
        raise RuntimeError("something else")


@pytest.mark.parametrize("phases", [OFFLINE, ONLINE | {"eval": 0}])
def test_an_environment_of_other_spaces_is_refused_before_any_file_changes(tmp_path, phases):
    evaluates = phases is OFFLINE
    phases = {name: value for name, value in phases.items() if name != "eval"}
    config = configuration(tmp_path, phases, eval_every=20 if evaluates else 0)
    message = "environment's observations have 1 numbers and those of the data have 4"
    with pytest.raises(ValueError, match=message):
        train(config, environment=Bandit, dataset=corridor_data())
    assert not [*tmp_path.rglob("*.*")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_every": -1}, "eval_every must be at least 0, got -1"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"start_training": 0}, "start_training must be at least 1, got 0"),
        ({"overwrite": True}, "resume and overwrite must not both be given"),
        ({"seeds": ()}, "seeds must be different numbers"),
        ({"seeds": (1, 1)}, "seeds must be different numbers"),
        ({"seeds": (-1,)}, "seeds must be different numbers"),
        ({"offline_steps": 0}, "must not both be 0"),
        ({"online_steps": 10, "start_training": 20}, "online_steps must be 0 or at least"),
        ({"use_data": False}, "offline_steps must be 0 where no data are used, got 150"),
        ({"use_data": False, "balanced_sampling": True}, "balanced_sampling must be off where no"),
    ],
)
def test_options_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        configuration(tmp_path, OFFLINE | changes)


def test_what_cannot_be_had_is_refused(tmp_path):
    config = configuration(tmp_path, OFFLINE)
    with pytest.raises(ValueError, match="options must be given"):
        train(replace(config, options=None), environment=Corridor, dataset=corridor_data())
    with pytest.raises(ValueError, match=r"options of agent 'bc' must be a BCConfig, got a QAMC"):
        train(replace(config, agent="bc"), environment=Corridor, dataset=corridor_data())
    with pytest.raises(ValueError, match="agent must be one of"):
        train(replace(config, agent="sac"), environment=Corridor, dataset=corridor_data())
    with pytest.raises(ValueError, match="device must be cpu, cuda or auto, got 'tpu9'"):
        train(replace(config, device="tpu9"), environment=Corridor, dataset=corridor_data())
    short = replace(config, options=options("qam", horizon=500))
    with pytest.raises(ValueError, match=r"data must have at least horizon=500 rows, .* got 400"):
        train(short, environment=Corridor, dataset=corridor_data())
    online = {"offline_steps": 0, "online_steps": 9, "start_training": 2, "use_data": False}
    with pytest.raises(ValueError, match="start_training must be at least the horizon, 3"):
        train(configuration(tmp_path, online), environment=Corridor)
    halves = configuration(tmp_path, online | {"use_data": True}, balanced_sampling=True)
    with pytest.raises(ValueError, match=r"at least the horizon, 3, where half of a batch .* 2"):
        train(halves, environment=Corridor, dataset=corridor_data())
    replay = Replay.from_dataset(corridor_data())
    with pytest.raises(ValueError, match=r"collector and a replay of .* online_steps is 1, got"):
        AgentLoss(replay, Phases(1, 1), collector=None)
    assert Episodes(Corridor, 0).env.action_space.shape == (2,)


@pytest.mark.slow
def test_threads_are_set_for_the_training_and_restored_after_it(tmp_path):
    class Threads(Callback):
        seen = 0

        def on_step(self, trainer, iteration, metrics):
            self.seen = torch.get_num_threads()

    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    short = {"offline_steps": 2, "online_steps": 0}
    fit(tmp_path / "two", short, threads=2, eval_every=0, callbacks=[during := Threads()])
    assert during.seen == 2
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    with pytest.raises(ValueError, match="holds a run already"):
        fit(tmp_path / "two", short, threads=2, resume=False)
    assert torch.get_num_threads() == before[0]
