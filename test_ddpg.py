"""Statements about DDPG, each with numbers that can be checked by hand. `python -m pytest` runs them."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import keras
import numpy as np
import pytest
import tensorflow as tf

import ddpg

HERE = Path(__file__).parent
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)


class Line(gym.Env):
    """x' = x + a, reward -(x^2 + a^2), x0 uniform in [-1, 1]; cut off or terminated after `length` steps."""

    def __init__(self, low=(-2.0,), high=(2.0,), length=20, terminates=False, size=1, observation=None):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        self.observation_space = observation or gym.spaces.Box(-np.inf, np.inf, (size,))
        self.length, self.terminates, self.actions = length, terminates, []
        self.x = np.zeros(size, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.x[:] = 0, self.np_random.uniform(-1, 1)
        return self.x, {}  # the same array every time, as fast environments do

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        reward = -float(self.x[0] ** 2 + action[0] ** 2)
        self.x += action[0]
        self.steps += 1
        over = self.steps == self.length
        return self.x, reward, over and self.terminates, over and not self.terminates, {}


def small(env=None, **settings):
    """An agent with small networks and a short warm-up."""
    settings = {"hidden": (8, 8), "batch_size": 4, "warmup": 4, "train_every": 4} | settings
    return ddpg.Agent(env or Line(), ddpg.Settings(**settings))


def by_hand():
    """Linear networks with numbers to calculate with: mu(s) = 2 tanh(s), Q = s + 3 a + 1,
    mu'(s) = 2 tanh(0) + ... = 1 everywhere, Q' = 2 s + a. Bounds are [-2, 2], so a / 2 enters Q."""
    agent = small(hidden=(), gamma=0.5, q_scale=1.0)
    agent.actor.set_weights([np.array([[1.0]]), np.array([0.0])])
    agent.critic.set_weights([np.array([[1.0], [6.0]]), np.array([1.0])])
    agent.target_actor.set_weights([np.array([[0.0]]), np.array([np.arctanh(0.5)])])
    agent.target_critic.set_weights([np.array([[2.0], [2.0]]), np.array([0.0])])
    return agent


def column(*values):
    return tf.constant([[float(value)] for value in values])


def batch_of(agent, n=1, seed=0):
    """`n` batches of random transitions, (n, N, row)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, agent.settings.batch_size, sum(agent.columns))).astype(np.float32)


def numbers(variables):
    return [np.array(variable) for variable in variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_critic_loss_equals_the_sum_done_by_hand():
    """y = r + 0.5 (1 - d) (2 s' + 1): 1 + 0.5 * 3 = 2.5, 2 (terminated), 3 + 0.5 * 7 = 6.5.
    Q = s + 3 a + 1: 1, 5, 0.  L = (1.5^2 + 3^2 + 6.5^2) / 3 = 53.5 / 3."""
    loss = by_hand().critic_loss(column(0, 1, 2), column(0, 1, -1), column(1, 2, 3),
                                 column(1, 2, 3), column(0, 1, 0))
    assert float(loss) == pytest.approx(53.5 / 3)


def test_actor_loss_is_minus_the_mean_value_of_its_actions():
    """Q(s, mu(s)) = s + 6 tanh(s) + 1 at s = 0, 1, -2."""
    expected = -np.mean([1, 2 + 6 * np.tanh(1), -1 - 6 * np.tanh(2)])
    assert float(by_hand().actor_loss(column(0, 1, -2))) == pytest.approx(expected)


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
        q = agent.critic([s, a])
    action_gradients = tape.gradient(q, a)
    with tf.GradientTape() as tape:
        mu = agent.actor(s)
    fed_in = tape.gradient(mu, agent.actor.trainable_variables, output_gradients=-action_gradients / 5)
    for one, other in zip(direct, fed_in, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)

    agent.actor_step(s)
    assert agent.actor_loss(s) < loss


def test_each_step_moves_its_own_network_and_nothing_else():
    agent = small()
    s, a, r, s_next, d = tf.split(batch_of(agent)[0], agent.columns, axis=1)
    networks = ["actor", "critic", "target_actor", "target_critic"]
    for step, moved in ((lambda: agent.critic_step(s, a, r, s_next, d), "critic"),
                        (lambda: agent.actor_step(s), "actor")):
        before = {name: getattr(agent, name).get_weights() for name in networks}
        step()
        for name in networks:
            assert same(before[name], getattr(agent, name).get_weights()) == (name != moved), name


def test_targets_start_as_copies_and_keep_tau_of_themselves():
    agent = small(tau=0.75)
    assert same(agent.weights, agent.target_weights)
    for weight in agent.weights:
        weight.assign(weight + 1)
    before = numbers(agent.target_weights)
    ddpg.soft_update(agent.target_weights, agent.weights, 0.75)
    for old, new in zip(before, agent.target_weights, strict=True):
        np.testing.assert_allclose(new, old + 0.25, atol=1e-6)


def test_a_block_of_steps_equals_blocks_of_one():
    together, apart = small(seed=3, tau=0.9), small(seed=3, tau=0.9)
    batches = batch_of(together, 5)
    untrained = numbers(together.variables)
    assert together.train_block(batches)
    for i in range(5):
        assert apart.train_block(batches[i:i + 1])
    for one, other, old in zip(together.variables, apart.variables, untrained, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    moved = [not np.array_equal(new, old) for new, old in zip(together.weights, untrained)]
    assert all(moved)
    gap = max(np.abs(a - b).max() for a, b in zip(numbers(together.target_weights), untrained[len(moved):]))
    assert 0 < gap < 1e-2  # the targets follow, slowly


def test_buffer_keeps_the_newest_rows_and_only_those():
    buffer, rng = ddpg.ReplayBuffer(5, 1, 1), np.random.default_rng(0)
    buffer.add([7], [7], 7, [7], True)
    assert np.all(buffer.sample(rng, 3, 50) == [7, 7, 7, 7, 1]), "an unfilled row was drawn"
    for i in range(1, 9):
        buffer.add([i], [10 + i], 20 + i, [30 + i], i % 2 == 0)
    drawn = np.unique(buffer.sample(rng, 500), axis=0)
    np.testing.assert_array_equal(drawn, [[i, 10 + i, 20 + i, 30 + i, i % 2 == 0] for i in range(4, 9)])
    assert buffer.sample(rng, 2, 3).shape == (2, 3, 5) and len(buffer) == 5


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
    noise = ddpg.Noise(2, 0.3, theta, np.random.default_rng(0))
    n = np.array([noise.sample() for _ in range(40_000)])[100:]
    rho = 1 - theta
    np.testing.assert_allclose(n.std(0), 0.3 / np.sqrt(1 - rho**2), rtol=0.03)
    np.testing.assert_allclose([np.corrcoef(x[1:], x[:-1])[0, 1] for x in n.T], rho, atol=0.02)
    assert abs(np.corrcoef(n.T)[0, 1]) < 0.05, "dimensions share their noise"
    noise.reset()
    assert not noise.n.any()


def test_actions_fill_asymmetric_bounds_and_never_leave_them():
    env = Line(low=(-1, 3), high=(0.1, 7), length=50)
    agent = small(env, noise=2.0, warmup=100, episodes=4, updates=0)
    list(ddpg.train(agent, env))  # Line asserts that each action is within its bounds
    for actions in (np.array(env.actions[:100]), np.array(env.actions[100:])):  # random, then noisy
        np.testing.assert_allclose(actions.min(0), [-1, 3], atol=0.15)
        np.testing.assert_allclose(actions.max(0), [0.1, 7], atol=0.15)
    assert np.ptp(agent.middle) > 0 and env.actions[0].dtype == np.float32


def test_noise_is_in_half_action_ranges_and_the_numpy_actor_is_the_keras_actor():
    agent = small(Line(low=(-1, -3), high=(2, 5), size=3))
    agent.learn(1) if len(agent.buffer) else agent.copy_actor()
    states = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.testing.assert_allclose([agent.act(s) for s in states], agent.actor(states), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(agent.act(states[0], 0.1) - agent.act(states[0]), [0.15, 0.4], rtol=1e-4)


@pytest.mark.parametrize("terminates", [True, False])
def test_the_loop_stores_terminated_but_not_truncated(terminates):
    """Only what terminates loses its future: r + gamma Q' is kept for what was merely cut off."""
    env = Line(length=3, terminates=terminates)
    agent = small(env, episodes=2, updates=0)
    list(ddpg.train(agent, env))
    s, a, r, s_next, d = np.split(agent.buffer.rows[:6], np.cumsum(agent.columns)[:-1], axis=1)
    assert d.ravel().tolist() == [0, 0, terminates] * 2
    np.testing.assert_allclose(s_next, s + a, atol=1e-6)
    np.testing.assert_allclose(r, -(s**2 + a**2), atol=1e-6)
    np.testing.assert_array_equal(s_next[0], s[1])
    assert s_next[2] != s[3], "episodes run into each other"


@pytest.mark.parametrize("updates, train_every, expected", [(1, 4, [4] * 5), (0.5, 1, [0, 1] * 8), (2, 8, [16, 16])])
def test_updates_are_gradient_steps_per_environment_step(monkeypatch, updates, train_every, expected):
    env, done = Line(length=10), []
    agent = small(env, episodes=2, updates=updates, train_every=train_every)
    monkeypatch.setattr(agent, "learn", lambda steps: done.append((agent.buffer.added, steps)))
    list(ddpg.train(agent, env))
    assert sum(steps for _, steps in done) == pytest.approx(sum(expected), abs=1)
    assert all(added >= 4 and added % train_every == 0 for added, _ in done)


def test_it_finds_the_linear_quadratic_optimum():
    """With P_20 = 0 and P = 1 + P' / (1 + P'), no policy gets more than -P_0 x0^2 from x0."""
    p = 0.0
    for _ in range(20):
        p = 1 + p / (1 + p)
    env = Line()
    agent = ddpg.Agent(env, ddpg.Settings(episodes=100, hidden=(32, 32), warmup=200, gamma=0.95))
    list(ddpg.train(agent, env))
    returns, optimum = ddpg.evaluate(agent, env)[0], []
    for seed in ddpg.EVALUATION_SEEDS:
        optimum.append(-p * float(env.reset(seed=seed)[0][0]) ** 2)
    assert np.all(returns <= np.array(optimum) + 1e-4)
    assert sum(returns) > 1.05 * sum(optimum)


@pytest.mark.parametrize("seed", [1, 2])
def test_pendulum_stands_up_within_20_episodes(seed):
    env = gym.make("Pendulum-v1")
    agent = ddpg.Agent(env, ddpg.Settings(episodes=20, seed=seed))
    list(ddpg.train(agent, env))
    assert np.mean(ddpg.evaluate(agent, env)[0]) > -200


@pytest.mark.parametrize("terminates, kept", [(True, 20), (False, 6)])
def test_honesty_compares_q_with_the_discounted_rest(terminates, kept):
    """Q is 1 everywhere, gamma 0.95: where an episode is cut off, 0.95^14 < 0.5 keeps states 0 to 6."""
    env = Line(terminates=terminates)
    agent = small(env, hidden=(), gamma=0.95, q_scale=1.0)
    agent.critic.set_weights([np.zeros((2, 1)), np.ones(1)])
    returns, pairs = ddpg.evaluate(agent, env)
    rewards = [t[2] for t in ddpg.play(agent.act, env, ddpg.EVALUATION_SEEDS[0])]
    assert returns[0] == pytest.approx(sum(rewards))
    assert len(pairs) == 10 * (20 if terminates else 7) and np.all(pairs[:, 0] == 1)
    followed = sum(0.95**k * r for k, r in enumerate(rewards)) + (not terminates) * 0.95**20
    assert followed == pytest.approx(pairs[:len(pairs) // 10, 1][-1])
