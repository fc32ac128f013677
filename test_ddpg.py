"""Statements about DDPG, each with numbers that can be checked by hand. `python -m pytest` runs them."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import ddpg  # first, as it silences what TensorFlow says when it starts
import gymnasium as gym
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning")  # between Keras and NumPy
tf.config.threading.set_intra_op_parallelism_threads(1)


class Line(gym.Env):
    """x' = keep x + push a, reward -(x^2 + effort a^2), x0 in [-1, 1]; over after `length` steps."""

    def __init__(self, low=(-2.0,), high=(2.0,), length=20, terminates=False, size=1,
                 keep=1.0, push=1.0, effort=1.0):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,))
        self.length, self.terminates, self.actions = length, terminates, []
        self.keep, self.push, self.effort = keep, push, effort
        self.x = np.zeros(size, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.x[:] = 0, self.np_random.uniform(-1, 1)
        return self.x, {}  # the same array every time, as fast environments do

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        reward = -float(self.x[0] ** 2 + self.effort * action[0] ** 2)
        self.x[:] = self.keep * self.x + self.push * action[0]
        self.steps += 1
        over = self.steps == self.length
        return self.x, reward, over and self.terminates, over and not self.terminates, {}


def small(environment=None, **changes):
    """An agent with small networks and a short warm-up, for a Line unless told otherwise."""
    changes = {"hidden": (8, 8), "batch_size": 4, "warmup": 4, "train_every": 4} | changes
    return ddpg.Agent(environment or Line(), ddpg.settings(**changes))


def by_hand():
    """Linear networks with numbers to calculate with: mu(s) = tanh(s), Q = s + 6 a + 1,
    mu'(s) = 1/2 everywhere, Q' = 2 s + 2 a. All a are in [-1, 1]."""
    agent = small(hidden=(), gamma=0.5)
    agent.actor.set_weights([np.array([[1.0]]), np.array([0.0])])
    agent.critic.set_weights([np.array([[1.0], [6.0]]), np.array([1.0])])
    agent.target_actor.set_weights([np.array([[0.0]]), np.array([np.arctanh(0.5)])])
    agent.target_critic.set_weights([np.array([[2.0], [2.0]]), np.array([0.0])])
    return agent


def average(agent):
    weights = agent.average_actor.get_weights()
    return lambda s: ddpg.mu(weights, s)


@contextlib.contextmanager
def eagerly():
    """Without compiling, which takes longer than a few small steps do."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def column(*values):
    return tf.constant([[float(value)] for value in values])


def batch_of(agent, n=1, seed=0):
    """`n` batches of random transitions, (n, N, row)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, agent.settings.batch_size, sum(agent.buffer.columns))).astype(np.float32)


def numbers(variables):
    return [variable.numpy() for variable in variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_critic_loss_equals_the_sum_done_by_hand():
    """y = r + 0.5 (1 - d) (2 s' + 1): 1 + 0.5 * 3 = 2.5, 2 (terminated), 3 + 0.5 * 7 = 6.5.
    Q = s + 6 a + 1: 1, 5, 0.  L = (1.5^2 + 3^2 + 6.5^2) / 3 = 53.5 / 3."""
    loss = by_hand().critic_loss(column(0, 1, 2), column(0, 0.5, -0.5), column(1, 2, 3),
                                 column(1, 2, 3), column(0, 1, 0))
    assert float(loss) == pytest.approx(53.5 / 3)


def test_actor_loss_is_minus_the_mean_value_of_its_actions():
    """Q(s, mu(s)) = s + 6 tanh(s) + 1 at s = 0, 1, -2."""
    expected = -np.mean([1, 2 + 6 * np.tanh(1), -1 - 6 * np.tanh(2)])
    assert float(by_hand().actor_loss(column(0, 1, -2))) == pytest.approx(expected)


def test_an_actor_in_the_flat_of_tanh_pays_a_toll_and_comes_back():
    """x = s + 20 is 20, 19 and -19, where tanh has no slope left. The tolls are 15^2, 14^2 and 14^2;
    Q = s + 6 tanh(x) + 1 is 7, 6 and -44."""
    agent = by_hand()
    agent.actor.set_weights([np.array([[1.0]]), np.array([20.0])])
    s = column(0, -1, -39)
    assert float(agent.actor_loss(s)) == pytest.approx((15**2 + 14**2 + 14**2 - 7 - 6 + 44) / 3)
    for _ in range(100):
        ddpg.descend(agent.actor, agent.actor_loss, s)
    assert np.all(np.abs(agent.before_tanh(s)) < 19.95)


def test_actor_gradient_is_the_chain_rule_and_raises_q():
    """The tape's gradient of J equals -1/N sum dQ/da dmu/dtheta with dQ/da computed apart and fed in."""
    agent = small(Line(low=(-1, -3), high=(2, 5), size=3))
    s = tf.constant(np.random.default_rng(0).normal(size=(5, 3)), tf.float32)
    with tf.GradientTape() as tape:
        loss = agent.actor_loss(s)
    direct = tape.gradient(loss, agent.actor.trainable_variables)

    a = tf.constant(agent.actor(s))
    with tf.GradientTape() as tape:
        tape.watch(a)
        q = agent.critic(tf.concat([s, a], axis=1))
    action_gradients = tape.gradient(q, a)
    with tf.GradientTape() as tape:
        mu = agent.actor(s)
    fed_in = tape.gradient(mu, agent.actor.trainable_variables, output_gradients=-action_gradients / 5)
    for one, other in zip(direct, fed_in, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)

    ddpg.descend(agent.actor, agent.actor_loss, s)
    assert agent.actor_loss(s) < loss


def test_networks_have_the_layers_asked_for_and_an_actor_starts_near_0_a_critic_does_not():
    """Hidden layers of 5 and 90; n = 3 state numbers and m = 1 action number enter the critic together."""
    agent = small(Line(size=3), hidden=(5, 90))
    for network, size, limit in ((agent.actor, 3, 3e-3), (agent.critic, 4, 1)):
        weights = network.get_weights()
        assert [weight.shape for weight in weights] == [(size, 5), (5,), (5, 90), (90,), (90, 1), (1,)]
        assert np.abs(weights[0]).max() > 0.1
        for sign in (-1, 1):  # the largest of 90 uniform numbers is below 0.8 times the limit once in 13,000
            assert 0.8 * limit < (sign * weights[-2]).max() <= limit


def test_each_step_moves_its_own_network_at_its_own_rate_and_nothing_else():
    """The first step of Adam moves each weight by the learning rate, whatever the gradient's size."""
    agent = small(actor_lr=0.01, critic_lr=0.02)
    rates = {"actor": 0.01, "critic": 0.02}
    s, a, r, s_next, d = tf.split(batch_of(agent)[0], agent.buffer.columns, axis=1)
    networks = ["actor", "critic", "target_actor", "target_critic"]
    for moved, loss, batch in (("critic", agent.critic_loss, (s, a, r, s_next, d)), ("actor", agent.actor_loss, (s,))):
        before = {name: getattr(agent, name).get_weights() for name in networks}
        value = float(loss(*batch))
        step = ddpg.descend(getattr(agent, moved), loss, *batch)
        assert float(step) == pytest.approx(value) and loss(*batch) < value
        for name in networks:
            moves = [np.abs(new - old).max() for new, old in zip(getattr(agent, name).get_weights(), before[name])]
            assert max(moves) == pytest.approx(rates[name] if name == moved else 0, rel=0.01), name


def test_targets_start_as_copies_and_keep_tau_of_themselves():
    agent = small(tau=0.75)
    for target, network in ((agent.target_actor, agent.actor), (agent.target_critic, agent.critic)):
        before = target.get_weights()
        assert same(before, network.get_weights()) and before[0].any()
        network.set_weights([weight + 1 for weight in before])
        ddpg.soft_update(target, network, 0.75)
        for old, new in zip(before, target.get_weights(), strict=True):
            np.testing.assert_allclose(new, old + 0.25, atol=1e-6)


def test_a_block_of_steps_equals_blocks_of_one():
    """Compiled or not. After each step the actor and the critic have moved, and what follows them by its share."""
    together, apart = small(seed=3, tau=0.9), small(seed=3, tau=0.9)
    batches = batch_of(together, 5)
    assert together.train_block(batches)
    for i in range(5):
        followers = [("target_actor", "actor", 0.9), ("target_critic", "critic", 0.9), ("average_actor", "actor", (i + 1) / (i + 5))]
        old = {name: getattr(apart, name).get_weights() for name in ("actor", "critic", "target_actor", "target_critic", "average_actor")}
        with eagerly():
            assert apart.train_block(batches[i:i + 1])
        for slow, network, share in followers:
            for was, now, goal in zip(old[slow], getattr(apart, slow).get_weights(), getattr(apart, network).get_weights()):
                np.testing.assert_allclose(now, share * was + (1 - share) * goal, rtol=1e-5, atol=1e-7)
        for network in ("actor", "critic"):
            assert not any(np.array_equal(was, now) for was, now in zip(old[network], getattr(apart, network).get_weights()))
    for one, other in zip(together.variables, apart.variables, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_buffer_keeps_the_newest_rows_and_only_those():
    buffer, rng = ddpg.ReplayBuffer(5, 1, 1), np.random.default_rng(0)
    buffer.add([7], [7], 7, [7], True)
    assert np.all(buffer.sample(rng, 3, 50) == [7, 7, 7, 7, 1]), "an unfilled row was drawn"
    for i in range(1, 9):
        buffer.add([i], [10 + i], 20 + i, [30 + i], i % 2 == 0)
    drawn = np.unique(buffer.sample(rng, 500), axis=0)
    np.testing.assert_array_equal(drawn, [[i, 10 + i, 20 + i, 30 + i, i % 2 == 0] for i in range(4, 9)])
    assert buffer.sample(rng, 2, 3).shape == (2, 3, 5)


def test_buffer_samples_uniformly():
    """10,000 draws from 10 rows: 1,000 each, with standard deviation 30."""
    buffer = ddpg.ReplayBuffer(100, 1, 1)
    for i in range(10):
        buffer.add([i], [0], 0, [0], False)
    counts = np.bincount(buffer.sample(np.random.default_rng(1), 100, 100)[..., 0].astype(int).ravel())
    assert len(counts) == 10 and np.abs(counts - 1000).max() < 120


@pytest.mark.parametrize("theta", [1.0, 0.15])
def test_noise_has_the_deviation_and_memory_of_theory(theta):
    """n is autoregressive: correlation rho = 1 - theta, deviation sigma / sqrt(1 - rho^2)."""
    def strays(length, episodes):  # keep = push = 0: in x = 0, where mu is 0, a = n, of eight numbers
        env = Line(low=[-1] * 8, high=[1] * 8, length=length, keep=0.0, push=0.0)
        agent = small(env, noise=0.1, noise_theta=theta, updates=0, episodes=episodes)
        list(ddpg.train(agent, env))
        return agent.buffer.rows[100:length * episodes, 1:9]  # the first few are the warm-up

    rho, n = 1 - theta, strays(4000, 1)
    assert n.std() == pytest.approx(0.1 / np.sqrt(1 - rho**2), rel=0.03)
    assert np.corrcoef(n[1:].ravel(), n[:-1].ravel())[0, 1] == pytest.approx(rho, abs=0.02)
    assert np.abs(np.corrcoef(n.T) - np.eye(8)).max() < 0.2, "dimensions share their noise"
    assert strays(1, 500).std() == pytest.approx(0.1, rel=0.06), "n does not start from 0"


def test_actions_fill_asymmetric_bounds_and_never_leave_them():
    env = Line(low=(-1, 3), high=(0.1, 7), length=50)
    agent = small(env, noise=2.0, warmup=100, episodes=4, updates=0)
    list(ddpg.train(agent, env))  # Line asserts that each action is within its bounds
    for actions in (np.array(env.actions[:100]), np.array(env.actions[100:])):  # random, then noisy
        np.testing.assert_allclose(actions.min(0), [-1, 3], atol=0.15)
        np.testing.assert_allclose(actions.max(0), [0.1, 7], atol=0.15)
        assert abs(np.corrcoef(actions.T)[0, 1]) < 0.5, "the dimensions move as one"
    assert abs(agent.buffer.rows[:, 1:3]).max() == 1, "what is remembered is not what was done"
    assert env.actions[0].dtype == np.float32


def test_rounding_takes_no_action_out_of_its_bounds():
    rng = np.random.default_rng(0)
    env = Line()
    env.action_space = gym.spaces.Box(rng.uniform(-1, 0, 100), rng.uniform(0, 1, 100), dtype=np.float64)
    for extreme in (-1.0, 1.0):
        next(ddpg.play(lambda s: np.full(100, extreme), env, 0))  # Line asserts that it is within its bounds


def test_the_numpy_actor_is_the_keras_actor_and_the_saved_policy_in_the_environments_units():
    env = Line(low=(-1, -3), high=(2, 5), size=3)
    agent = small(env)
    for weight in agent.average_actor.variables:
        weight.assign(weight + np.random.default_rng(1).normal(0, 0.3, weight.shape))
    states = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    weights = agent.average_actor.get_weights()
    actions = np.array([ddpg.mu(weights, s) for s in states])
    np.testing.assert_allclose(actions, agent.average_actor(states), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(agent.policy(states), [0.5, 1] + [1.5, 4] * actions, rtol=1e-5, atol=1e-5)
    for state, a, *_ in ddpg.play(lambda s: ddpg.mu(weights, s), env, 0):
        np.testing.assert_allclose(env.actions[-1], agent.policy(state[None])[0], rtol=1e-5, atol=1e-5)


def test_the_loop_explores_around_the_online_actor_of_the_last_block():
    """After the warm-up, a = mu(s) + n: without noise mu(s), that of the block before; with it, it strays by sigma."""
    for sigma in (0.0, 0.2):
        agent = small(noise=sigma, episodes=60, train_every=20, warmup=20, updates=0.25, hidden=(8,))
        run = ddpg.train(agent, Line())
        with eagerly():
            next(run)
        weights, old = agent.actor.get_weights(), agent.target_actor.get_weights()
        agent.settings.updates = 0
        list(run)
        assert 0.4 < agent.buffer.rows[:20, 1].std() < 0.75, "the warm-up is not uniform, of deviation 1 / sqrt(3)"
        s, a = agent.buffer.rows[20:1200, :1], agent.buffer.rows[20:1200, 1:2]
        strays = (a - np.array([ddpg.mu(weights, state) for state in s])).ravel()
        assert strays.std() == pytest.approx(sigma, rel=0.1, abs=1e-6) and abs(strays.mean()) < 0.03
        assert sigma or not np.allclose(a, np.array([ddpg.mu(old, state) for state in s]), atol=1e-6)


@pytest.mark.parametrize("terminates", [True, False])
def test_the_loop_stores_terminated_but_not_truncated(terminates):
    """Only what terminates loses its future: r + gamma Q' is kept for what was merely cut off."""
    env = Line(length=3, terminates=terminates)
    agent = small(env, episodes=2, updates=0)
    list(ddpg.train(agent, env))
    s, a, r, s_next, d = np.split(agent.buffer.rows[:6], np.cumsum(agent.buffer.columns)[:-1], axis=1)
    assert d.ravel().tolist() == [0, 0, terminates] * 2
    np.testing.assert_allclose(s_next, s + 2 * a, atol=1e-6)  # Line's own actions are in [-2, 2]
    np.testing.assert_allclose(r, -(s**2 + 4 * a**2), atol=1e-5)
    np.testing.assert_array_equal(s_next[0], s[1])
    assert s_next[2] != s[3], "episodes run into each other"


@pytest.mark.parametrize("changes, expected", [
    ({"updates": 1.0}, {4: 4, 8: 4, 12: 4, 16: 4, 20: 4}),
    ({"updates": 0.5, "train_every": 3}, {6: 2, 9: 1, 12: 2, 15: 1, 18: 2}),
    ({"updates": 2.0, "train_every": 8}, {8: 16, 16: 16})])
def test_updates_are_gradient_steps_per_environment_step(monkeypatch, changes, expected):
    """20 steps, the first 4 a warm-up: after how many of them come how many gradient steps?"""
    env, done = Line(length=10), {}
    agent = small(env, episodes=2, **changes)
    monkeypatch.setattr(agent, "train_block", lambda batches: done.update({agent.buffer.added: len(batches)}) or True)
    list(ddpg.train(agent, env))
    assert done == expected


def test_a_block_is_one_call_to_tensorflow(monkeypatch):
    """40 steps with 2 gradient steps each, in blocks of 8: 5 calls of 16, and none to act."""
    env, calls = Line(length=10), []
    agent = small(env, episodes=4, updates=2.0, train_every=8, warmup=8)
    monkeypatch.setattr(agent, "train_block", lambda batches: calls.append(batches.shape) or True)
    monkeypatch.setattr(keras.Model, "__call__", None)
    list(ddpg.train(agent, env))
    assert calls == [(16, 4, 5)] * 5


def test_another_seed_gives_another_run():
    returns = {}
    for seed in (0, 1):
        agent = small(episodes=2, updates=0, seed=seed)
        list(ddpg.train(agent, Line()))
        start, action = agent.buffer.rows[0, :2]  # both random
        returns[seed] = [start, action, agent.actor.get_weights()[0].tolist()]
    assert all(one != other for one, other in zip(*returns.values()))


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_linear_quadratic_optimum(seed):
    """Riccati: no policy beats -P_5 x0^2, P_0 = 0, P_k+1 = 1 + 0.64 P_k - (0.4 P_k)^2 / (0.1 + 0.25 P_k).
    Seeds 0, 1 and 100 to 103 ended 0.1 to 0.3 % below that."""
    p = 0.0
    for _ in range(5):
        p = 1 + 0.64 * p - (0.4 * p) ** 2 / (0.1 + 0.25 * p)
    env = Line(low=(-1.2,), high=(1.2,), length=5, keep=0.8, push=0.5, effort=0.1)
    agent = ddpg.Agent(env, ddpg.settings(episodes=400, seed=seed))
    list(ddpg.train(agent, env))
    returns, _ = zip(*ddpg.evaluate(agent, env))
    optimum = np.array([-p * env.reset(seed=seed)[0][0] ** 2 for seed in ddpg.EVALUATION_SEEDS])
    assert np.all(np.array(returns) <= optimum + 1e-4) and sum(returns) > 1.01 * sum(optimum)


@pytest.mark.parametrize("seed", [100, 101])
def test_pendulum_stands_up_within_20_episodes(seed):
    """Seeds 100 to 119 gave -151.2 to -143.0; a policy that needs one swing more from each start gives -200 or less."""
    env = gym.make("Pendulum-v1")
    agent = ddpg.Agent(env, ddpg.settings(episodes=20, seed=seed))
    list(ddpg.train(agent, env))
    assert np.mean([total for total, _ in ddpg.evaluate(agent, env)]) > -160


@pytest.mark.parametrize("terminates, kept", [(True, 20), (False, 7)])
def test_honesty_compares_q_with_the_discounted_rest(terminates, kept):
    """Q(x, a) = x + 2 a and mu(x) = tanh(-x / 40), the average actor's, which leaves x, and so Q, far
    from 0 at the end. With gamma = 0.95, where an episode is cut off, 0.95^14 < 0.5 keeps states 0 to 6."""
    env = Line(terminates=terminates)
    agent = small(env, hidden=(), gamma=0.95)
    agent.average_actor.set_weights([np.array([[-0.025]]), np.zeros(1)])
    agent.critic.set_weights([np.array([[1.0], [2.0]]), np.zeros(1)])
    def q(x):
        return x + 2 * np.tanh(-x / 40)
    episodes = list(ddpg.evaluate(agent, env))
    states, _, rewards, next_states, _ = zip(*ddpg.play(average(agent), env, ddpg.EVALUATION_SEEDS[0]))
    assert abs(q(next_states[-1][0])) > 0.01, "Q of the last state is too near 0 to tell"
    assert [len(pairs) for _, pairs in episodes] == [kept] * 10 and episodes[0][0] == pytest.approx(sum(rewards))
    estimates, followed = np.transpose(episodes[0][1])[:, ::-1]  # the last state comes first
    np.testing.assert_allclose(estimates, q(np.ravel(states)[:kept]), atol=1e-6)
    for t in range(kept):
        rest = [*rewards[t:], 0.0 if terminates else q(next_states[-1][0])]
        assert followed[t] == pytest.approx(sum(0.95**k * r for k, r in enumerate(rest)), abs=1e-5)


def test_the_plot_shows_the_returns_and_their_mean():
    history = [(200 * i, -float(i**2)) for i in range(1, 31)]
    left, right = ddpg.plot(history, np.array([[1.0, 2.0], [3.0, 5.0]])).axes
    returns, mean = (line.get_xydata() for line in left.lines)
    np.testing.assert_array_equal(returns, [(i, -(i**2)) for i in range(1, 31)])
    np.testing.assert_allclose(mean[:, 1], [-np.mean(np.arange(i - 9, i + 1) ** 2) for i in range(10, 31)])
    assert mean[0, 0] == 10 and left.get_xlabel() == "episode" and "return" in left.get_ylabel()
    np.testing.assert_array_equal(right.collections[0].get_offsets(), [[2, 1], [5, 3]])
    assert len(ddpg.plot([], np.empty((0, 2))).axes) == 2, "a run that ended before its first episode"


def test_the_buffer_takes_its_capacity_times_its_row_and_no_more():
    assert small(buffer_size=1000).buffer.rows.nbytes == 1000 * (1 + 1 + 1 + 1 + 1) * 4


class Refuses(Line):
    """Environments that ddpg.py cannot learn in, by name."""

    SPACES = {"Image-v0": (gym.spaces.Box(0, 255, (4, 4), np.uint8), None),
              "Dict-v0": (gym.spaces.Dict(x=gym.spaces.Box(-1, 1, (1,))), None),
              "Finite-v0": (gym.spaces.Discrete(3), None),
              "Buttons-v0": (None, gym.spaces.Discrete(3)),
              "Unbounded-v0": (None, gym.spaces.Box(-np.inf, 1, (1,))),
              "Table-v0": (None, gym.spaces.Box(-1, 1, (2, 2)))}

    def __init__(self, name):
        super().__init__()
        observation, action = self.SPACES[name]
        self.observation_space = observation or self.observation_space
        self.action_space = action or self.action_space


for name in Refuses.SPACES:
    gym.register(name, lambda name=name, **_: Refuses(name), disable_env_checker=True)
gym.register("Line-v0", Line, disable_env_checker=True)


@functools.partial(gym.register, "Extra-v0")
def not_installed(**_):
    raise gym.error.DependencyNotInstalled('run `pip install "gymnasium[extra]"`')


def refused(*options):
    with pytest.raises(SystemExit) as ended:
        ddpg.main([*map(str, options)])
    assert ended.value.code == 2


@pytest.mark.parametrize("options, named", [
    *[([f"--{name}", value], (name, value)) for name, values in {
        "episodes": ["0", "-3", "many"], "seed": ["-1"], "hidden": ["0", "8.5"], "batch-size": ["0"],
        "buffer-size": ["0", "10"], "warmup": ["0", "10"], "train-every": ["0"], "updates": ["-1"],
        "gamma": ["1.01", "-0.1", "nan"], "tau": ["1.01", "-0.1"], "noise-theta": ["1.01", "-0.1"],
        "noise": ["-0.1"], "actor-lr": ["-0.001", "inf"], "critic-lr": ["-0.001"]}.items() for value in values],
    (["--batch-size", "300", "--warmup", "200"], ("batch-size", "300", "200")),
    (["--hidden"], ("hidden", "at least one")),
    (["--env", "Nowhere-v0"], ("--env", "Nowhere-v0")),
    (["--env", "nowhere:Nowhere-v0"], ("--env", "nowhere")),
    (["--env", "Extra-v0"], ("--env", "Extra-v0", "install")),
    *[(["--env", name], (name, "one dimension")) for name in Refuses.SPACES],
    (["--resume"], ("--out", "checkpoint.npz")),
    (["--watch"], ("--out", "checkpoint.npz")),
    (["--gif"], ("--out", "checkpoint.npz")),
    (["--frobnicate"], ("--frobnicate",)),
])
def test_bad_input_gets_one_line_and_leaves_nothing(options, named, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DISPLAY", ":0")
    refused(*options, "--out", tmp_path / "out")
    printed = capfd.readouterr()
    assert printed.err.startswith("ddpg.py: ") and printed.err.count("\n") == 1, printed.err
    assert all(word in printed.err for word in named) and printed.out == ""
    assert "cannot read" not in printed.err or "checkpoint.npz" in named
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_refused_before_training(tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/nowhere")):
        refused("--out", out)
        assert str(out) in capfd.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize("damage", ["foreign", "cut", "empty", "pickle"])
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, tmp_path, capfd):
    path = tmp_path / "checkpoint.npz"
    small().save(path)
    if damage == "foreign":
        np.savez(path, x=np.ones(3))
    elif damage == "pickle":
        np.savez(path, settings=np.array([{}], dtype=object))
    else:
        path.write_bytes(path.read_bytes()[:{"cut": -100, "empty": 0}[damage]])
    before = path.read_bytes()
    for option in (["--resume"], []):
        refused(*option, "--out", tmp_path)
        err = capfd.readouterr().err
        assert str(tmp_path) in err and path.name in err and err.count("\n") == 1
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_version_is_refused_with_its_name(tmp_path, capfd):
    agent = small()
    agent.settings.colour = "red"  # a setting that this version does not have
    agent.save(tmp_path / "checkpoint.npz")
    refused("--resume", "--out", tmp_path)
    err = capfd.readouterr().err
    assert "colour" in err and str(tmp_path) in err and err.count("\n") == 1


def test_a_checkpoint_from_an_environment_of_other_sizes_is_refused_in_few_words(tmp_path, capfd):
    small(Line(size=100), env="Line-v0").save(tmp_path / "checkpoint.npz")
    refused("--resume", "--out", tmp_path)
    err = capfd.readouterr().err
    assert "Line-v0" in err and str(tmp_path) in err and err.count("\n") == 1 and len(err) < 400


def test_runs_are_finished_resumed_replaced_or_refused_as_they_should(tmp_path, monkeypatch, capfd):
    run = ["--env", "Line-v0", "--out", str(tmp_path), "--batch-size", "4", "--warmup", "20", "--hidden", "4", "--updates", "0"]
    small(episodes=3, env="Line-v0", updates=0).save(tmp_path / "checkpoint.npz")
    refused(*run)
    assert "--resume" in capfd.readouterr().err, "an unfinished run was overwritten"
    refused("--resume", "--hidden", "4", "--out", tmp_path)
    err = capfd.readouterr().err
    assert "contradicts" in err and ("--hidden [4]" in err and "[8, 8]" in err)
    assert ddpg.main(["--out", str(tmp_path), "--resume"]) == 0
    finished = (tmp_path / "returns.csv").read_text().splitlines()
    assert finished[0] == "episode,steps,return" and [row.split(",")[:2] for row in finished[1:]] == [
        ["1", "20"], ["2", "40"], ["3", "60"]]
    refused("--resume", "--episodes", "2", "--out", tmp_path)
    assert ddpg.main(["--out", str(tmp_path), "--resume", "--episodes", "4", "--warmup", "4"]) == 0
    assert (tmp_path / "returns.csv").read_text().splitlines()[:4] == finished
    before = (tmp_path / "checkpoint.npz").read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(Line, "reset", lambda self, **_: 1 / 0)
        refused(*run)
    assert "division by zero" in capfd.readouterr().err
    assert (tmp_path / "checkpoint.npz").read_bytes() == before, "a finished run was replaced by nothing"
    assert ddpg.main([*run, "--episodes", "1"]) == 0 and "replac" in capfd.readouterr().out
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 2
    assert ddpg.read_checkpoint(tmp_path / "checkpoint.npz")["settings"] == vars(ddpg.settings(
        env="Line-v0", episodes=1, batch_size=4, warmup=20, hidden=[4], updates=0.0)), "settings of the run that was replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "actor.keras", "checkpoint.npz", "returns.csv", "returns.png"]


def test_divergence_is_named_and_leaves_the_last_good_checkpoint(tmp_path, capfd):
    """The reward overflows float32 in the third episode, after a checkpoint that is still good."""
    env = Line(length=10)
    env.step = lambda action, step=env.step: (lambda x, r, *rest: (x, r * 1e30 ** (env.episode > 2), *rest))(*step(action))
    env.episode, reset = 0, env.reset
    def counting_reset(**options):
        env.episode += 1
        return reset(**options)
    env.reset = counting_reset
    agent = small(env, episodes=5, updates=0.25)
    agent.save(tmp_path / "checkpoint.npz")
    with eagerly():
        assert ddpg.run(agent, env, tmp_path) == 1
    assert "episode 3" in capfd.readouterr().err
    saved = ddpg.read_checkpoint(tmp_path / "checkpoint.npz")
    assert saved["added"] == len(saved["rows"]) == 0 and saved["history"] == []
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 3, "the episodes before are not shown"
    assert same(numbers(agent.variables), [saved[f"arr_{i}"] for i in range(len(agent.variables))])


def test_a_loss_that_is_not_finite_is_noticed_wherever_in_the_block_it_was():
    """The square of an error of 3e19 overflows, but the gradient, a sixteenth of twice the error, and its
    square do not: the weights stay finite."""
    agent = small(batch_size=16, warmup=16)
    batches = batch_of(agent, 3)
    assert agent.train_block(batches)
    batches[0, 0, 2] = 3e19
    assert not agent.train_block(batches)
    assert all(np.isfinite(variable).all() for variable in numbers(agent.variables))


def test_a_reward_that_is_no_number_never_reaches_the_memory(tmp_path, capfd):
    env = Line(length=10)
    env.step = lambda action, step=env.step: (lambda x, r, *rest: (x, r * np.nan, *rest))(*step(action))
    agent, before = small(env, warmup=50), signal.getsignal(signal.SIGINT)
    assert ddpg.run(agent, env, str(tmp_path / "new")) == 1
    assert "episode 1" in capfd.readouterr().err and agent.buffer.added == 0
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C was not given back"


@pytest.mark.parametrize("space, values", [(gym.spaces.Box(-2, 2, (1,), np.int64), {-2, -1, 0, 1, 2}),
                                           (gym.spaces.Box(0, 1, (1,), bool), {False, True})])
def test_whole_number_actions_are_rounded_and_reach_their_bounds(space, values):
    env = Line()
    env.action_space = space
    agent = small(env, noise=1.0, warmup=50, episodes=10, updates=0)
    list(ddpg.train(agent, env))
    for actions in (env.actions[:50], env.actions[50:]):
        assert set(np.ravel(actions)) == values


def test_reward_and_terminated_may_be_arrays_of_one_number():
    env = Line(length=3, terminates=True)
    env.step = lambda action, step=env.step: [np.array([x]) if i in (1, 2) else x for i, x in enumerate(step(action))]
    agent = small(env, episodes=1)
    assert list(ddpg.train(agent, env)) == [pytest.approx(sum(agent.buffer.rows[:3, 2]))]
    assert agent.buffer.rows[:3, -1].tolist() == [0, 0, 1]


def test_ctrl_c_works_again_even_if_the_results_cannot_be_written(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ddpg, "plot", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ddpg.run(small(episodes=1, updates=0), Line(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_exception_of_the_environment_keeps_what_was_learned(tmp_path):
    env = Line(length=10)
    agent = small(env, episodes=5, updates=0)
    def broken_reset(reset=env.reset, **options):
        if len(agent.history) == 3:
            raise RuntimeError("unplugged")
        return reset(**options)
    env.reset = broken_reset
    with pytest.raises(RuntimeError, match="unplugged"):
        ddpg.run(agent, env, tmp_path)
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 4
    again = small(episodes=5, seed=1)
    again.restore(ddpg.read_checkpoint(tmp_path / "checkpoint.npz"))
    assert same(numbers(again.variables), numbers(agent.variables))
    assert again.history == agent.history and (tmp_path / "actor.keras").exists()


def test_ctrl_c_finishes_the_episode_and_the_resumed_run_gives_the_same_digits(tmp_path, capfd):
    whole, agent, resumed = (small(episodes=5, updates=0, seed=seed) for seed in (0, 0, 1))
    list(ddpg.train(whole, Line(length=10)))
    env = Line(length=10)
    env.step = lambda action, step=env.step: (agent.buffer.added == 25 and signal.raise_signal(signal.SIGINT), step(action))[1]
    agent.save = lambda path, save=agent.save: (agent.history and signal.raise_signal(signal.SIGINT), save(path))  # impatience
    before = signal.getsignal(signal.SIGINT)
    assert ddpg.run(agent, env, tmp_path) == 130 and f'--resume --out "{tmp_path}"' in capfd.readouterr().out
    assert agent.history == whole.history[:3] and signal.getsignal(signal.SIGINT) is before
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 4 and (tmp_path / "actor.keras").exists()
    resumed.restore(ddpg.read_checkpoint(tmp_path / "checkpoint.npz"))
    assert resumed.history == agent.history
    list(ddpg.train(resumed, Line(length=10)))
    assert resumed.history == whole.history and same(numbers(resumed.variables), numbers(whole.variables))


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (FloatingPointError, 1)])
def test_a_finished_training_is_not_lost_while_it_is_evaluated(error, status, tmp_path, monkeypatch):
    def evaluate(*_):
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise FloatingPointError
        yield
    monkeypatch.setattr(ddpg, "evaluate", evaluate)
    agent = small(episodes=3, updates=0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    try:
        assert ddpg.run(agent, Line(), tmp_path) == status
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ddpg.read_checkpoint(tmp_path / "checkpoint.npz")["history"]) == 3


def start(code, *arguments, cwd=HERE):
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, arguments)], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(HERE)})


def wait_for(process, text):
    """Read what the process prints until `text` is in it."""
    seen = b""
    while text not in seen:
        byte = process.stdout.read(1)
        assert byte, process.stderr.read().decode()
        seen += byte
    return seen.decode()


def finish(process, status=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, err.decode()
    return out.decode(), err.decode()


SHORT = ["--hidden", "8", "--batch-size", "16", "--warmup", "100", "--episodes", "12"]
SCRIPT = """
import os, runpy, signal, sys, time
def state():
    return sorted(os.listdir()), signal.getsignal(signal.SIGINT)
before = state()
import ddpg
threads, figures = ddpg.tf.config.threading.get_intra_op_parallelism_threads(), ddpg.plt.get_fignums()
print("the import left all as it was" if state() == before and threads == 0 and figures == [] else state())
print("a real error", file=sys.stderr)
ddpg.plt.get_backend = lambda: "a window, let us say"
ddpg.plt.show = lambda: (print(os.listdir(sys.argv[-1])), print("shown"), time.sleep(60))
runpy.run_path(ddpg.__file__, run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """`python ddpg.py` is started; the function that is returned waits for its window and closes it by Ctrl-C."""
    out = tmp_path_factory.mktemp("script") / "whole"
    process = start(SCRIPT, *SHORT, "--out", out, cwd=out.parent)

    @functools.cache
    def result():
        printed = wait_for(process, b"shown")
        process.send_signal(signal.SIGINT)
        return out, printed, finish(process, -signal.SIGINT)[1]
    return result


def test_the_same_seed_gives_the_same_digits_through_kills(script, tmp_path):
    """The script is left alone; another run is killed, resumed, killed again and resumed."""
    def run(*options):
        code = "import sys, ddpg; ddpg.SAVE_EVERY = 0; sys.exit(ddpg.main(sys.argv[1:]))"
        return start(code, "--out", tmp_path, *options)

    def kill(process, text):
        wait_for(process, text)
        process.kill()
        process.wait()

    kill(run(*SHORT), b"episode 3/")
    kill(run("--resume"), b"episode 6/")
    resumed = run("--resume")
    whole, *_ = script()
    out, err = finish(resumed)
    assert err == "" and "without noise" in out and "episode 1/" not in out, "it started again"
    returns = (whole / "returns.csv").read_text()
    assert (tmp_path / "returns.csv").read_text() == returns and len(returns.splitlines()) == 13


def test_the_saved_actor_is_the_final_policy_in_a_python_without_our_code(script):
    whole, *_ = script()
    saved = ddpg.read_checkpoint(whole / "checkpoint.npz")
    agent = ddpg.Agent(gym.make("Pendulum-v1"), ddpg.settings(**saved["settings"]))
    agent.restore(saved)
    states = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    plain = subprocess.run(
        [sys.executable, "-c", "import json, keras, sys; states = keras.ops.array(json.loads(sys.argv[2])); "
         "print(keras.models.load_model(sys.argv[1])(states).numpy().tolist())",
         whole / "actor.keras", json.dumps(states.tolist())], capture_output=True, check=True, cwd="/")
    loaded = np.array(json.loads(plain.stdout))
    assert loaded.shape == (5, 1) and np.ptp(loaded) > 0
    np.testing.assert_allclose(loaded, [2 * average(agent)(state) for state in states], rtol=1e-4, atol=1e-5)


def test_a_script_shows_its_picture_and_ctrl_c_closes_it_without_a_word(script):
    _, printed, err = script()
    assert "shown" in printed and "returns.png" in printed and "Traceback" not in err and "Warning" not in err


def test_an_import_changes_nothing_and_says_nothing(script):
    _, printed, err = script()
    assert printed.startswith("the import left all as it was")
    assert err == "a real error\n", "TensorFlow is heard, or nothing is any more"


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        ddpg.main(["--help"])
    text = capsys.readouterr().out
    for name, value in vars(ddpg.settings()).items():
        assert f"--{name.replace('_', '-')}" in text and f"default: {value}" in " ".join(text.split())


@pytest.mark.parametrize("fps, duration", [(20, 50), (125, 20)])  # viewers play anything below 20 ms slowly
def test_a_gif_needs_no_display(fps, duration, tmp_path, monkeypatch, capfd):
    name = f"Short{fps}-v0"
    gym.register(name, "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=fps)
    env = gym.make(name)
    monkeypatch.setitem(env.unwrapped.metadata, "render_fps", fps)
    agent = ddpg.Agent(env, ddpg.settings(env=name))
    agent.save(tmp_path / "checkpoint.npz")
    assert ddpg.main(["--gif", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "policy.gif") as gif:
        assert fps / 2 < gif.n_frames <= fps + 1 and gif.info["duration"] == duration
    total = sum(t[2] for t in ddpg.play(average(agent), env, ddpg.EVALUATION_SEEDS[0]))
    assert re.findall("return .*", capfd.readouterr().out) == [f"return {total:.5g}"]


def test_a_policy_is_watched_in_a_window(tmp_path, monkeypatch):
    """In a process of its own, with a window that nobody sees but that uses OpenGL, as real ones do, if allowed."""
    env = gym.make("Pendulum-v1")
    agent = ddpg.Agent(env, ddpg.settings())
    agent.save(tmp_path / "checkpoint.npz")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SDL_VIDEODRIVER", "offscreen")
    monkeypatch.delenv("SDL_FRAMEBUFFER_ACCELERATION", raising=False)
    code = ("import sys, ddpg; ddpg.EVALUATION_SEEDS = [3, 4]; "
            "ddpg.gym.make('Pendulum-v1').unwrapped.metadata['render_fps'] = 0; "  # as fast as it can be drawn
            "sys.exit(ddpg.main(sys.argv[1:]))")
    out, _ = finish(start(code, "--watch", "--out", tmp_path))
    totals = [sum(t[2] for t in ddpg.play(average(agent), env, seed)) for seed in (3, 4)]
    assert out == "".join(f"return {total:.5g}\n" for total in totals)


def test_ctrl_c_ends_watching_without_a_traceback(tmp_path, monkeypatch):
    def ctrl_c(*_, **__):
        raise KeyboardInterrupt
    small(env="Line-v0").save(tmp_path / "checkpoint.npz")
    monkeypatch.setattr(ddpg.gym, "make", ctrl_c)
    assert ddpg.main(["--gif", "--out", str(tmp_path)]) == 130


@pytest.mark.parametrize("env, option, named", [("Pendulum-v1", "--watch", "--watch finds no display"), ("Line-v0", "--gif", "render_mode")])
def test_what_cannot_be_watched_says_so_in_one_line(env, option, named, tmp_path, monkeypatch, capfd):
    ddpg.Agent(gym.make(env), ddpg.settings(env=env)).save(tmp_path / "checkpoint.npz")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    refused(option, "--out", tmp_path)
    err = capfd.readouterr().err
    assert named in err and err.count("\n") == 1


def test_the_readme_and_the_program_agree(tmp_path, monkeypatch):
    """Cited sections, named functions, tests and settings exist; excerpts are verbatim; its Python runs."""
    readme, program = (HERE / "README.md").read_text(), (HERE / "ddpg.py").read_text()
    sections = set(re.findall(r"^## (\d+)\.", readme, re.M))
    cited = set(re.findall(r"section (\d+)", program))
    assert cited and cited <= sections
    notes = readme[readme.index("# The notes"):readme.index("# Exercises")]
    excerpts = re.findall(r"```python\n(.*?)```", notes, re.S)
    assert len(excerpts) >= 8 and all(excerpt in program for excerpt in excerpts)
    for name in re.findall(r"`((?:ddpg\.)?[A-Za-z_]+(?:\.[a-z_]+)?)(?:\([^`]*\))?`", notes):
        where = small() if name.startswith("agent.") else ddpg
        for part in re.sub(r"^(ddpg|agent)\.", "", name).split("."):
            where = globals().get(part) or getattr(where, part)
    tests = re.findall(r"`(test_\w+)`", readme)
    assert len(tests) >= 5 and set(tests) <= set(globals())
    for option in set(re.findall(r"`--[a-z][a-z-]+|(?<= )--[a-z][a-z-]+", readme)) - {"--help", "`--help"}:
        option = option.strip("`")
        assert option[2:].replace("-", "_") in ddpg.SETTINGS or f'"{option}"' in program, option
    python = re.search(r"```python\n(import gymnasium.*?)```", readme, re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(python.replace("episodes=50", "episodes=2"), {})
    assert Path("actor.keras").exists()
