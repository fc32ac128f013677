"""Statements about DDPG and, below "The program", about the program around it, each with numbers
that can be checked by hand. `python -m pytest` runs them."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import ddpg  # first, as it silences what TensorFlow says when it starts
import gymnasium as gym
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")]  # it advises on odd environments
tf.config.threading.set_intra_op_parallelism_threads(1)
MACHINE_CODE = ddpg.Agent.learn
ddpg.Agent.learn = tf.function(MACHINE_CODE.python_function)  # a second less for each Agent


class Line(gym.Env):
    """x' = keep x + push a, reward -(x^2 + effort a^2), x0 in [-1, 1]; over after `length` steps.
    The state is scale x + shift, `size` times. `lived` counts the steps of all episodes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, low=(-2.0,), high=(2.0,), length=20, terminates=False, size=1, keep=1.0,
                 push=1.0, effort=1.0, scale=1.0, shift=0.0, spaces=(), render_mode=None):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,))
        vars(self).update(spaces)
        self.length, self.terminates, self.render_mode = length, terminates, render_mode
        self.keep, self.push, self.effort, self.scale, self.shift = keep, push, effort, scale, shift
        self.state, self.actions, self.lived = np.zeros(size, np.float32), [], 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.x = 0, self.np_random.uniform(-1, 1)
        return self.see(), {}

    def see(self):
        self.state[:] = self.scale * self.x + self.shift
        return self.state  # the same array every time, as fast environments do

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        reward = -float(self.x**2 + self.effort * action[0] ** 2)
        self.x = self.keep * self.x + self.push * float(action[0])
        self.steps, self.lived = self.steps + 1, self.lived + 1
        over = self.steps == self.length
        return self.see(), reward, over and self.terminates, over and not self.terminates, {}

    def render(self):
        return np.full((8, 8, 3), 100 + self.steps, np.uint8)


class Awakes(Line):
    """The state is x, 0 and 0.1; from step `wakes` on it is x, x and x + 0.1."""

    def __init__(self, wakes):
        super().__init__(size=3)
        self.wakes = wakes

    def see(self):
        moved = self.x if self.lived >= self.wakes else 0
        self.state[:] = self.x, moved, 0.1 + moved
        return self.state


class Odd(Line):
    """10 x, rounded, and all else that is said is said in types that one meets."""

    def __init__(self, types):
        super().__init__(length=3, terminates=True, scale=10)
        self.types = types

    def see(self):
        state = np.rint(super().see())
        return state.tolist() if self.types == "lists" else state.astype(
            self.types if self.types in ("float64", "int64") else "float32")

    def step(self, action):
        state, reward, terminated, truncated, info = super().step(action)
        if self.types == "arrays":
            reward, terminated, truncated = map(np.array, ([reward], [terminated], [truncated]))
        return state, reward, terminated, truncated, info


class Fails(Line):
    """A Line in which something goes wrong in step `at` of its life, or from that on."""

    REWARDS = {"reward nan": np.nan, "reward inf": -np.inf, "reward 1e39": 1e39,
               "reward 1e30": 1e30}  # the square of the last is too large for float32

    def __init__(self, how, at, **arguments):
        super().__init__(**arguments)
        self.how, self.at = how, at

    def step(self, action):
        state, reward, *over, info = super().step(action)
        if self.lived >= self.at:
            reward = self.REWARDS.get(self.how, reward)
            if self.how == "never ends":
                over = [False, False]
        if self.lived == self.at:
            if self.how == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            if self.how == "raises":
                raise RuntimeError("unplugged")
            state = {"state nan": state * np.nan, "state of two": np.zeros(2)}.get(self.how, state)
        return state, reward, *over, info


class Blind(Line):
    metadata = {"render_modes": []}


def small(environment=None, **changes):
    """An agent with small networks and a short warm-up, for a Line unless told otherwise."""
    changes = {"hidden": [4], "batch_size": 4, "warmup": 4, "block": 4, "steps": 100,
               "buffer_size": 1000} | changes
    return ddpg.Agent(environment or Line(), ddpg.make_settings(**changes))


def trained(environment, **changes):
    agent = small(environment, **changes)
    for _ in ddpg.train(agent, environment):
        pass
    return agent


def by_hand():
    """Linear networks with numbers to calculate with: mu(s) = tanh(s), Q = s + 6 a + 1,
    mu'(s) = 1/2 everywhere, Q' = 2 s + 2 a."""
    agent = small(hidden=[], gamma=0.5)
    agent.actor.set_weights([np.array([[1.0]]), np.array([0.0])])
    agent.critic.set_weights([np.array([[1.0], [6.0]]), np.array([1.0])])
    agent.target_actor.set_weights([np.array([[0.0]]), np.array([np.arctanh(0.5)])])
    agent.target_critic.set_weights([np.array([[2.0], [2.0]]), np.array([0.0])])
    return agent


@pytest.fixture
def still(monkeypatch):
    """The networks stay as they are."""
    monkeypatch.setattr(ddpg.Agent, "learn", lambda agent, batches: 0.0)


@pytest.fixture
def machine_code(monkeypatch):
    """Learning is compiled as users have it."""
    monkeypatch.setattr(ddpg.Agent, "learn", MACHINE_CODE)


@pytest.fixture
def eager():
    """Learning is not compiled at all, which takes longer than two small steps do."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def column(*values):
    return tf.constant([[float(value)] for value in values])


def random_batches(agent, k):
    """k batches of random transitions, as learn takes them."""
    rng, sizes = np.random.default_rng(0), [*np.diff([0, *agent.buffer.ends]), 1]
    shapes = [(k, agent.settings.batch_size, size) for size in sizes]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def remembered(agent):
    """s, a, r, s', d of the steps so far, a column or more of each."""
    return np.split(agent.buffer.rows[:agent.buffer.added], agent.buffer.ends, axis=1)


def weights(agent):
    return {name: getattr(agent, name).get_weights() for name in (
        "actor", "critic", "target_actor", "target_critic", "average_actor")}


def numbers(agent):
    """All that learning changes."""
    return [np.asarray(variable) for variable in ddpg.variables(agent)]


def same(first, second):
    """Whether two lists of arrays are equal to the last digit."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_critics_loss_equals_the_sum_done_by_hand():
    """y = r + 0.5 (1 - d) (2 s' + 1): 1 + 0.5 * 3 = 2.5, 2 (terminated), 3 + 0.5 * 7 = 6.5.
    Q = s + 6 a + 1: 1, 5, 0.  L = (1.5^2 + 3^2 + 6.5^2) / 3 = 53.5 / 3."""
    loss = by_hand().critic_loss(column(0, 1, 2), column(0, 0.5, -0.5), column(1, 2, 3),
                                 column(1, 2, 3), column(0, 1, 0))
    assert float(loss) == pytest.approx(53.5 / 3)


def test_the_actors_loss_is_minus_the_mean_value_of_its_actions():
    """Q(s, mu(s)) = s + 6 tanh(s) + 1 at s = 0, 1, -2."""
    expected = -np.mean([1, 2 + 6 * np.tanh(1), -1 - 6 * np.tanh(2)])
    assert float(by_hand().actor_loss(column(0, 1, -2))) == pytest.approx(expected)


def test_an_actor_where_tanh_is_flat_pays_a_toll():
    """x = s + 20 is 20, 19, -19 and 4: tolls of 15^2, 14^2, 14^2 and none.
    Q = s + 6 tanh(x) + 1 is 7, 6, -44 and -15 + 6 tanh(4)."""
    agent = by_hand()
    agent.actor.set_weights([np.array([[1.0]]), np.array([20.0])])
    expected = (15**2 + 14**2 + 14**2 - 7 - 6 + 44 + 15 - 6 * np.tanh(4)) / 4
    assert float(agent.actor_loss(column(0, -1, -39, -16))) == pytest.approx(expected)


def test_the_actors_gradient_is_the_chain_rule():
    """The tape's gradient of J equals -1/N sum dQ/da dmu/dtheta, dQ/da computed apart and fed in."""
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
    fed_in = tape.gradient(mu, agent.actor.trainable_variables,
                           output_gradients=-action_gradients / 5)
    for one, other in zip(direct, fed_in, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("end, function", [("tanh", np.tanh), ("linear", np.positive)])
def test_a_network_is_relu_between_and_as_told_at_its_end(end, function):
    """Hidden: relu(s - 1) and relu(-s), then 2 and 3 of these, less 1: 1, -1, 5 at s = 2, 1, -2."""
    network = ddpg.ann(1, [2, 1], end)
    network.set_weights([np.array([[1.0, -1.0]]), np.array([-1.0, 0.0]),
                         np.array([[2.0], [3.0]]), np.array([-1.0])])
    np.testing.assert_allclose(network(column(2, 1, -2)), function([[1], [-1], [5]]), rtol=1e-6)


def test_targets_and_average_start_as_copies_that_do_not_move_along():
    """3 numbers of a state enter the actor; these and 1 of an action enter the critic together."""
    agent = small(Line(size=3), hidden=[5, 7])
    before = weights(agent)
    for name, leader, size in (("target_actor", "actor", 3), ("target_critic", "critic", 4),
                               ("average_actor", "actor", 3)):
        shapes = [weight.shape for weight in before[name]]
        assert shapes == [(size, 5), (5,), (5, 7), (7,), (7, 1), (1,)]
        assert same(before[name], before[leader]) and before[name][0].any()
    for network in (agent.actor, agent.critic):
        network.set_weights([weight + 1 for weight in network.get_weights()])
    for name in ("target_actor", "target_critic", "average_actor"):
        assert same(before[name], weights(agent)[name])


def test_a_soft_update_keeps_tau_of_the_target():
    """theta' = 1, theta = 5, tau = 0.75: 0.75 * 1 + 0.25 * 5 = 2."""
    target, network = ddpg.ann(2, [3], "tanh"), ddpg.ann(2, [3], "tanh")
    target.set_weights([np.full((2, 3), 1.0), np.full(3, 1.0)])
    network.set_weights([np.full((2, 3), 5.0), np.full(3, 5.0)])
    ddpg.soft_update(target, network, 0.75)
    assert all(np.all(weight == 2) for weight in target.get_weights())
    assert all(np.all(weight == 5) for weight in network.get_weights())


def first_moves_of_adam(network, loss, rate):
    """Its first step moves a weight by the rate, against the gradient, if that is not tiny."""
    with tf.GradientTape() as tape:
        value = loss()
    gradients = map(np.array, tape.gradient(value, network.trainable_variables))
    return [-rate * g / (abs(g) + 3.16e-6) for g in gradients]


def test_a_step_moves_the_critic_then_the_actor_then_what_follows_them(eager):
    """The actor descends through the critic as it then is. Then the targets keep 0.9 of themselves,
    and the average 1/5 in this first step."""
    agent, twin = (small(tau=0.9, actor_lr=0.01, critic_lr=0.02) for _ in range(2))
    batches, before = random_batches(agent, 1), weights(agent)
    s, a, r, s_next, d = (piece[0] for piece in batches)
    critic_moves = first_moves_of_adam(
        twin.critic, lambda: twin.critic_loss(s, a, r, s_next, d), 0.02)
    agent.learn(batches)
    after = weights(agent)
    twin.critic.set_weights(after["critic"])
    actor_moves = first_moves_of_adam(twin.actor, lambda: twin.actor_loss(s), 0.01)
    for name, moves in (("critic", critic_moves), ("actor", actor_moves)):
        for old, new, move in zip(before[name], after[name], moves, strict=True):
            np.testing.assert_allclose(new - old, move, rtol=0.01, atol=1e-5)
    for name, leader, share in (("target_critic", "critic", 0.9), ("target_actor", "actor", 0.9),
                                ("average_actor", "actor", 1 / 5)):
        for old, new, goal in zip(before[name], after[name], after[leader], strict=True):
            np.testing.assert_allclose(new, share * old + (1 - share) * goal, rtol=1e-5, atol=1e-7)


def test_the_average_keeps_t_of_t_plus_4_of_itself(eager):
    """It is 0, and the actor 5, 2 and 7 in steps 1, 2 and 3:
    4/5 * 5 = 4, then 2/6 * 4 + 4/6 * 2 = 8/3, then 3/7 * 8/3 + 4/7 * 7 = 36/7."""
    agent = small(hidden=[], actor_lr=0)
    agent.average_actor.set_weights([np.array([[0.0]]), np.array([0.0])])
    for place, expected in ((5.0, 4), (2.0, 8 / 3), (7.0, 36 / 7)):
        agent.actor.set_weights([np.array([[place]]), np.array([0.0])])
        agent.learn(random_batches(agent, 1))
        assert agent.average_actor.get_weights()[0].item() == pytest.approx(expected)


def test_a_block_of_steps_equals_blocks_of_one_compiled_or_not(machine_code):
    together, apart = small(seed=3, tau=0.9), small(seed=3, tau=0.9)
    batches = random_batches(together, 3)
    together.learn(batches)
    tf.config.run_functions_eagerly(True)
    for i in range(3):
        apart.learn([piece[i:i + 1] for piece in batches])
    tf.config.run_functions_eagerly(False)
    for one, other in zip(numbers(together), numbers(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["the critic's loss", "the actor's loss", "a weight"])
def test_what_is_not_finite_is_noticed_wherever_it_was(what, eager):
    """An error of 3e19 or a toll of (1e20 - 5)^2 overflows when squared, but the gradients do not:
    the weights stay finite. A learning rate without end leaves finite losses in the one step."""
    agent = small(batch_size=16, hidden=[])
    batches = random_batches(agent, 2)
    assert np.isfinite(agent.learn(batches))
    if what == "the critic's loss":
        batches[2][0, 0] = 3e19
    elif what == "the actor's loss":
        agent.actor.set_weights([np.array([[0.0]]), np.array([1e20])])
    else:
        agent.actor.optimizer.learning_rate = np.inf
        batches = [piece[:1] for piece in batches]
    assert not np.isfinite(agent.learn(batches))
    finite = [np.isfinite(weight).all() for weight in numbers(agent)[:4]]
    assert all(finite) == (what != "a weight")


def test_the_memory_keeps_the_newest_rows_and_only_those():
    buffer, rng = ddpg.ReplayBuffer(5, 1, 1), np.random.default_rng(0)
    buffer.add([7], [7], 7, [7], True)
    assert all(np.all(piece == 7) for piece in buffer.sample(rng, 50)[:4]), "an unfilled row"
    for i in range(1, 9):
        buffer.add([i], [10 + i], 20 + i, [30 + i], i % 2 == 0)
    drawn = np.unique(np.concatenate(buffer.sample(rng, 500), axis=1), axis=0)
    rows = [[i, 10 + i, 20 + i, 30 + i, i % 2 == 0] for i in range(4, 9)]
    np.testing.assert_array_equal(drawn, rows)


def test_the_memory_is_sampled_uniformly():
    """10,000 draws from 10 rows: 1,000 each, with standard deviation 30."""
    buffer = ddpg.ReplayBuffer(100, 1, 1)
    for i in range(10):
        buffer.add([i], [0], 0, [0], False)
    states = buffer.sample(np.random.default_rng(1), 100, 100)[0]
    counts = np.bincount(states.astype(int).ravel())
    assert len(counts) == 10 and np.abs(counts - 1000).max() < 120


def test_a_sample_has_its_states_in_standard_units_and_the_memory_raw_ones():
    """Mean 10, deviation 2: a state of 14 is 2, the next one of 8 is -1."""
    buffer = ddpg.ReplayBuffer(5, 2, 1)
    buffer.mean, buffer.deviation = np.array([10.0, 0.0]), np.array([2.0, 1.0])
    buffer.add([14, 6], [0.5], 100, [8, 7], True)
    pieces = buffer.sample(np.random.default_rng(0), 3, 4)
    for piece, values in zip(pieces, ([2, 6], [0.5], [100], [-1, 7], [1]), strict=True):
        assert piece.shape == (3, 4, len(values)) and piece.dtype == np.float32
        assert np.all(piece == values)
    assert buffer.rows[0].tolist() == [14, 6, 0.5, 100, 8, 7, 1]
    assert buffer.rows.nbytes == 5 * 7 * 4, "capacity, numbers in a row, bytes of a number"


@pytest.mark.parametrize("capacity", [3, 100])
def test_measuring_finds_mean_and_deviation_of_the_remembered_states(capacity):
    """2, 4 and 9: mean 5, deviation sqrt((9 + 1 + 16) / 3); 10 times that in the second number, and
    7 more. Next states, rows that are not filled, and states that are overwritten do not count."""
    buffer = ddpg.ReplayBuffer(capacity, 2, 1)
    for s in [1000, 2, 4, 9][capacity == 100:]:
        buffer.add([s, 10 * s + 7], [0], 0, [500, 500], False)
    buffer.measure()
    np.testing.assert_allclose(buffer.mean, [5, 57])
    np.testing.assert_allclose(buffer.deviation, np.sqrt(26 / 3) * np.array([1, 10]))


@pytest.mark.parametrize("constant", [0, 0.1, 1e6 + 0.1, -1e-6])
def test_a_number_that_rested_is_0_in_standard_units_and_keeps_its_own_when_it_moves(constant):
    buffer = ddpg.ReplayBuffer(5000, 1, 1)
    for _ in range(3000):
        buffer.add([constant], [0], 0, [constant], False)
    buffer.measure()
    moved = buffer.standard(np.float32([[constant], [constant + 0.5]]))
    np.testing.assert_allclose(moved, [[0], [0.5]], atol=1e-6 + abs(constant) * 1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_number_that_moves_by_a_thousandth_of_itself_counts_in_any_unit(scale):
    buffer = ddpg.ReplayBuffer(5, 1, 1)
    for s in (999 * scale, 1001 * scale):
        buffer.add([s], [0], 0, [0], False)
    buffer.measure()
    np.testing.assert_allclose(buffer.sample(np.random.default_rng(0), 9)[0] ** 2, 1, rtol=1e-3)


@pytest.mark.parametrize("warmup, block, steps, measured", [
    (8, 4, 26, 24), (100, 2500, 13_000, 10_100)])
def test_states_are_measured_at_each_block_of_10000_steps_after_the_warmup(
        warmup, block, steps, measured, still):
    """Blocks end at 8, 12, ... 24, and at 100, 2600, 5100, 7600, 10100 (no later one counts)."""
    agent = trained(Line(length=13, scale=3, shift=1000), warmup=warmup, block=block, steps=steps,
                    buffer_size=steps)
    states = remembered(agent)[0][:measured]
    np.testing.assert_allclose(agent.buffer.mean, states.mean(dtype=float), rtol=1e-9)
    np.testing.assert_allclose(agent.buffer.deviation, states.std(dtype=float), rtol=1e-9)


@pytest.mark.parametrize("scale", [4, 1 / 64])
def test_the_states_units_do_not_matter(scale):
    """A power of two is exact in floating point, so even the digits are the same."""
    one, other = (trained(Line(scale=x), warmup=8, steps=60) for x in (1, scale))
    assert np.array_equal(remembered(other)[0], scale * remembered(one)[0])
    assert one.history == other.history and same(numbers(one), numbers(other))


@pytest.mark.parametrize("wakes, deviations", [(10**9, [1, 1]), (22, [pytest.approx(2, abs=1.9)] * 2)])
def test_an_environment_trains_though_some_numbers_rest_or_rested_at_first(wakes, deviations):
    agent = trained(Awakes(wakes), warmup=20, steps=60)  # what is not finite raises an error
    assert agent.buffer.deviation[1:].tolist() == deviations
    assert np.all(np.abs(agent.buffer.sample(np.random.default_rng(0), 200)[0]) < 10)


@pytest.mark.parametrize("theta", [1.0, 0.15])
def test_noise_has_the_deviation_and_memory_of_theory(theta, still):
    """n is autoregressive: correlation rho = 1 - theta, deviation sigma / sqrt(1 - rho^2).
    Eight numbers an action, of an actor that says 0, so that a = n."""
    def noise(length, steps):
        env = Line(low=[-1] * 8, high=[1] * 8, length=length, push=0)
        agent = small(env, noise=0.1, noise_theta=theta, warmup=100, steps=steps, buffer_size=steps)
        agent.actor.set_weights([0 * weight for weight in agent.actor.get_weights()])
        list(ddpg.train(agent, env))
        return remembered(agent)[1][100:]

    rho, n = 1 - theta, noise(4100, 4100)
    assert n.std() == pytest.approx(0.1 / np.sqrt(1 - rho**2), rel=0.05)
    assert np.corrcoef(n[1:].ravel(), n[:-1].ravel())[0, 1] == pytest.approx(rho, abs=0.02)
    assert np.abs(np.corrcoef(n.T) - np.eye(8)).max() < 0.2, "dimensions share their noise"
    n = noise(1, 600)
    assert n.std() == pytest.approx(0.1, rel=0.06), "n does not start from 0 in each episode"
    assert len(np.unique(n[:, 0])) == 500, "episodes share their noise"


def test_actions_fill_asymmetric_bounds_and_never_leave_them(still):
    env = Line(low=(-1, 3), high=(0.1, 7), length=50)
    a = remembered(trained(env, noise=2.0, warmup=100, steps=200))[1]  # Line asserts the bounds
    for actions in (np.array(env.actions[:100]), np.array(env.actions[100:])):  # random, then noisy
        np.testing.assert_allclose(actions.min(0), [-1, 3], atol=0.15)
        np.testing.assert_allclose(actions.max(0), [0.1, 7], atol=0.15)
        assert abs(np.corrcoef(actions.T)[0, 1]) < 0.5, "the dimensions move as one"
    np.testing.assert_allclose(env.actions, [-0.45, 5] + [0.55, 2] * a, atol=1e-5)
    assert abs(a).max() == 1 and env.actions[0].dtype == np.float32


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rounding_takes_no_action_out_of_its_bounds_however_far_apart(kind):
    low, high = np.sort(np.random.default_rng(0).uniform(-1, 1, (2, 1000)), axis=0).astype(kind)
    low[0], high[0] = -3e38, 3e38
    space = gym.spaces.Box(low, high, dtype=kind)
    for a, bound in ((-1.0, low), (1.0, high)):
        action = ddpg.in_bounds(np.full(1000, a), space)
        assert space.contains(action)
        np.testing.assert_allclose(action, bound, rtol=1e-5, atol=1e-6)


def test_the_numpy_actor_is_the_keras_actor():
    actor, rng = ddpg.ann(3, [8, 5, 2], "tanh"), np.random.default_rng(0)
    actor.set_weights([rng.normal(size=weight.shape) for weight in actor.get_weights()])
    states = rng.normal(size=(20, 3)).astype(np.float32)
    actions = [ddpg.mu(actor.get_weights(), s) for s in states]
    np.testing.assert_allclose(actions, actor(states), rtol=1e-4, atol=1e-5)


def test_the_loop_acts_at_random_then_by_the_online_actor_of_the_last_block():
    """200 uniform numbers in [-1, 1] have deviation 1 / sqrt(3) = 0.58. Without noise, those of the
    200 steps that follow the first block of learning are mu(s), in its standard units."""
    env = Line(shift=100, scale=5, length=200)
    agent = small(env, noise=0, warmup=200, block=200, steps=400)
    run = ddpg.train(agent, env)
    next(run)
    online, mean, deviation = agent.actor.get_weights(), agent.buffer.mean, agent.buffer.deviation
    assert not same(online, agent.average_actor.get_weights())
    next(run)
    s, a, *_ = remembered(agent)
    assert a[:200].std() == pytest.approx(0.58, abs=0.06) and abs(a[:200].mean()) < 0.1
    expected = [ddpg.mu(online, np.float32((state - mean) / deviation)) for state in s[200:]]
    np.testing.assert_allclose(a[200:], expected, atol=1e-6)


@pytest.mark.parametrize("terminates", [True, False])
def test_the_loop_stores_terminated_but_not_truncated(terminates, still):
    """Only what terminates loses its future: r + gamma Q' is kept for what was merely cut off."""
    s, a, r, s_next, d = remembered(trained(Line(length=3, terminates=terminates), steps=6))
    assert d.ravel().tolist() == [0, 0, terminates] * 2
    np.testing.assert_allclose(s_next, s + 2 * a, atol=1e-6)  # Line's own actions are in [-2, 2]
    np.testing.assert_allclose(r, -(s**2 + 4 * a**2), atol=1e-5)
    np.testing.assert_array_equal(s_next[:2], s[1:3])
    assert s_next[2] != s[3], "episodes run into each other"


@pytest.mark.parametrize("types", ["lists", "float64", "int64", "arrays"])
def test_states_rewards_and_ends_may_have_odd_types(types, still):
    usual, odd = trained(Odd("usual"), steps=9), trained(Odd(types), steps=9)
    assert same(remembered(usual), remembered(odd)) and usual.history == odd.history


@pytest.mark.parametrize("warmup, block, expected", [
    (8, 4, [8, 12, 16, 20]), (10, 5, [10, 15, 20]), (7, 1, [*range(7, 21)]), (6, 20, [6])])
def test_a_block_is_one_call_with_as_many_batches_as_it_has_steps(
        warmup, block, expected, monkeypatch):
    """After how many of the 20 steps is there a call? (And no other to Keras, not even to act.)"""
    calls, env = {}, Line(length=10)
    agent = small(env, warmup=warmup, block=block, steps=20)

    def learn(agent, batches):
        calls[agent.buffer.added] = [piece.shape for piece in batches]
        return 0.0

    monkeypatch.setattr(ddpg.Agent, "learn", learn)
    monkeypatch.setattr(keras.Model, "__call__", None)
    list(ddpg.train(agent, env))
    assert calls == {added: [(block, 4, 1)] * 5 for added in expected}


def test_the_loop_yields_each_return_until_the_first_episode_that_reaches_the_budget(still):
    env = Line(length=7)
    agent = small(env, steps=15)
    returns = list(ddpg.train(agent, env))
    np.testing.assert_allclose(returns, remembered(agent)[2].reshape(3, 7).sum(axis=1), rtol=1e-5)
    assert agent.history == [[7, returns[0]], [14, returns[1]], [21, returns[2]]]


def test_one_seed_gives_one_run_and_another_another():
    one, again, other = (trained(Line(length=2), seed=n, steps=40, warmup=20) for n in (5, 5, 6))
    assert same(numbers(one), numbers(again)) and same(remembered(one), remembered(again))
    for first, second in zip(remembered(one)[:2], remembered(other)[:2]):
        assert first[0] != second[0], "a start or a random action that does not depend on the seed"
    assert not np.allclose(numbers(one)[0], numbers(other)[0], atol=0.01)
    assert len(np.unique(remembered(one)[0][::2])) == 20, "two episodes start alike"
    assert len(np.unique(remembered(one)[1])) == 40, "two episodes draw alike"


@pytest.mark.parametrize("how", ["state nan", "reward nan", "reward inf", "reward 1e39"])
def test_what_is_not_finite_never_reaches_the_memory(how, still):
    env = Fails(how, at=7)
    agent = small(env)
    with pytest.raises(ddpg.DDPGError, match="finite"):
        list(ddpg.train(agent, env))
    assert agent.buffer.added == 6 and not agent.buffer.rows[6:].any()


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_linear_quadratic_optimum(seed, machine_code):
    """Riccati: none beats -P_5 x0^2, P_0 = 0, P_k+1 = 1 + 0.64 P_k - (0.4 P_k)^2 / (0.1 + 0.25 P_k)."""
    p = 0.0
    for _ in range(5):
        p = 1 + 0.64 * p - (0.4 * p) ** 2 / (0.1 + 0.25 * p)
    env = Line(low=(-1.2,), high=(1.2,), length=5, keep=0.8, push=0.5, effort=0.1)
    agent = ddpg.Agent(env, ddpg.make_settings(steps=2000, seed=seed))
    list(ddpg.train(agent, env))
    returns = list(ddpg.evaluate(agent, env))
    starts = [env.reset(seed=seed)[0][0] for seed in ddpg.EVALUATION_SEEDS]
    optimum = -p * np.array(starts) ** 2
    assert np.all(np.array(returns) <= optimum + 1e-4) and sum(returns) > 1.01 * sum(optimum)


@pytest.mark.parametrize("seed", [100, 101])
def test_a_pendulum_stands_up_within_30_episodes(seed, machine_code):
    """A policy that needs one swing more from each start gives -200 or less."""
    env = gym.make("Pendulum-v1")
    agent = ddpg.Agent(env, ddpg.make_settings(steps=6000, seed=seed))
    list(ddpg.train(agent, env))
    assert np.mean(list(ddpg.evaluate(agent, env))) > -170


# The program: environments in it are called Test-v0.
SHORT = ["--env", "Test-v0", "--steps", "60", "--warmup", "20", "--block", "4", "--hidden", "4",
         "--batch-size", "4", "--buffer-size", "1000"]


def register(environment=Line, name="Test-v0", **arguments):
    gym.registry.pop(name, None)
    gym.register(name, environment, kwargs=arguments, disable_env_checker=True)


def ddpg_py(*options):
    """The exit status of `python ddpg.py` with these options."""
    try:
        return ddpg.main([*map(str, options)])
    except SystemExit as ended:  # as argparse does
        return ended.code


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digits(folder):
    """Every number of a run: returns, memory, units, and all that learning changes."""
    _, history, arrays = ddpg.read(folder / "checkpoint.npz")
    return [np.array(history), *arrays]


def one_line(captured, *words):
    """Whether standard error is one line that has these words."""
    assert captured.err.startswith("ddpg.py: ") and captured.err.count("\n") == 1, captured.err
    assert all(str(word) in captured.err for word in words), captured.err
    return len(captured.err) < 500


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C is heard, whatever the shell set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    register()
    folder = tmp_path_factory.mktemp("whole") / "a" / "b"
    assert ddpg_py(*SHORT, "--out", folder) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A folder that the checkpoint of that run was copied to."""
    register()
    return Path(shutil.copy(whole / "checkpoint.npz", tmp_path)).parent


def test_a_run_leaves_a_row_for_each_episode_and_three_more_files(whole):
    assert set(contents(whole)) == {"returns.csv", "returns.png", "actor.keras", "checkpoint.npz"}
    header, *rows = (whole / "returns.csv").read_text().splitlines()
    history = digits(whole)[0]
    assert header == "episode,steps,return" and len(history) == 3
    assert rows == [f"{i},{20 * i},{history[i - 1][1]}" for i in (1, 2, 3)]


def test_a_run_prints_its_progress_and_the_mean_of_ten_episodes_of_its_policy(tmp_path, capfd):
    """That is actor.keras, played here on raw states in the environment's own units."""
    register(low=(-1,), high=(2,), scale=5, shift=100, length=5)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 0
    *lines, last = capfd.readouterr().out.strip().splitlines()
    history = digits(tmp_path)[0]
    for i, line in enumerate(line for line in lines if line.startswith("episode")):
        ten = history[max(0, i - 9):i + 1, 1].mean()
        for part in (f"episode {i + 1},", f"{5 * i + 5}/60", f"{history[i, 1]:.5g}", f"{ten:.5g}"):
            assert part in line
    env, policy = gym.make("Test-v0"), keras.models.load_model(tmp_path / "actor.keras")
    totals = np.zeros(10)
    for i, seed in enumerate(ddpg.EVALUATION_SEEDS):
        s, over = env.reset(seed=seed)[0], False
        while not over:
            s, r, _, over, _ = env.step(np.clip(policy(s[None])[0], -1, 2).astype(np.float32))
            totals[i] += r
    printed = [float(number) for number in re.findall(r" (-\d+\.\d*)", last)]
    assert printed == [pytest.approx(totals.mean(), rel=1e-3)] and str(tmp_path) in last
    assert i == 11 - 2 and len(np.unique(totals)) == 10


def test_a_run_has_a_folder_of_its_own_that_its_env_and_seed_find_again(
        tmp_path, monkeypatch, still):
    register(name="ns/Test-v0")
    monkeypatch.chdir(tmp_path)
    options = ["--env", "sys:ns/Test-v0", "--seed", 7]
    assert ddpg_py(*SHORT, *options) == ddpg_py("--resume", *options) == 0
    assert len(contents(tmp_path / "runs" / "sys-ns-Test-v0-seed7")) == 4


@pytest.mark.parametrize("backend, shown", [("a window, let us say", True), ("agg", False)])
def test_the_picture_is_shown_where_there_is_a_display(backend, shown, copy, monkeypatch, still):
    seen = []
    monkeypatch.setattr(ddpg.plt, "get_backend", lambda: backend)
    monkeypatch.setattr(ddpg.plt, "show", lambda: seen.append(len(contents(copy))))
    assert ddpg_py("--resume", "--out", copy) == 0
    assert seen == [4] * shown, "not shown as it should, or before all was written"


@pytest.mark.parametrize("episodes", [30, 0])
def test_the_plot_shows_the_returns_and_the_mean_of_the_last_ten(episodes):
    axes, = ddpg.plot([[200 * i, -float(i**2)] for i in range(1, episodes + 1)]).axes
    returns, means = (line.get_xydata().tolist() for line in axes.lines)
    assert returns == [[200 * i, -(i**2)] for i in range(1, episodes + 1)]
    assert means == [[200 * i, pytest.approx(-np.mean(np.arange(i - 9, i + 1) ** 2))]
                     for i in range(10, episodes + 1)]
    assert "steps" in axes.get_xlabel() and "return" in axes.get_ylabel()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole, capfd):
    before = contents(whole)
    assert ddpg_py(*SHORT, "--out", whole) == 2
    assert one_line(capfd.readouterr(), whole, "--resume", "--steps", "--out", "delete")
    assert contents(whole) == before


@pytest.mark.parametrize("step", [3, 20, 47, 60, 61, 250])
def test_ctrl_c_at_any_step_costs_no_digit(step, whole, tmp_path, capfd):
    """In the warm-up, at its end, within a block, at the end, and twice while it is evaluated."""
    register(Fails, how="Ctrl-C", at=step)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 130
    printed, all_rows = capfd.readouterr(), (whole / "returns.csv").read_text().splitlines()
    assert f'--resume --out "{tmp_path}"' in printed.out.splitlines()[-1]
    assert "Traceback" not in printed.err and len(contents(tmp_path)) == 4
    rows = (tmp_path / "returns.csv").read_text().splitlines()
    assert rows == all_rows[:1 + min(step - 1, 60) // 20], "returns so far are not written"
    register()
    assert ddpg_py("--resume", "--out", tmp_path) == 0
    assert same(digits(tmp_path), digits(whole))
    assert (tmp_path / "returns.csv").read_text().splitlines() == all_rows


@pytest.mark.parametrize("step, episodes, resume", [(3, 0, []), (50, 2, ["--resume"])])
def test_an_exception_of_the_environment_keeps_what_was_learned(
        step, episodes, resume, whole, tmp_path):
    """A run that broke in its first episode has no need of --resume."""
    register(Fails, how="raises", at=step)
    with pytest.raises(RuntimeError, match="unplugged"):
        ddpg_py(*SHORT, "--out", tmp_path)
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 1 + episodes
    assert len(contents(tmp_path)) == 4
    register()
    assert ddpg_py(*SHORT, *resume, "--out", tmp_path) == 0
    assert same(digits(tmp_path), digits(whole))


@pytest.mark.parametrize("how, named", [
    ("state nan", "finite"), ("reward nan", "finite"), ("reward 1e39", "finite"),
    ("reward 1e30", "learning rates"), ("state of two", "(2,)")])
def test_what_cannot_go_on_is_named_and_leaves_a_good_checkpoint(
        how, named, whole, tmp_path, capfd):
    """It happens in the third episode, after the checkpoint of the first."""
    register(Fails, how=how, at=44)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 1
    assert one_line(capfd.readouterr(), "episode 3", named)
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 3
    register()
    assert ddpg_py("--resume", "--out", tmp_path) == 0
    assert same(digits(tmp_path), digits(whole))


def test_a_policy_with_weights_that_are_not_finite_is_not_saved(tmp_path, monkeypatch, capfd):
    def diverge(agent, batches):
        agent.average_actor.variables[0].assign([[np.nan] * 4])
        return np.nan

    register()
    monkeypatch.setattr(ddpg.Agent, "learn", diverge)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 1
    assert one_line(capfd.readouterr(), "episode 1", "finite", "learning rates")
    assert set(contents(tmp_path)) == {"returns.csv", "returns.png", "checkpoint.npz"}
    assert all(np.isfinite(array).all() for array in digits(tmp_path))


def test_an_episode_without_end_stops_after_ten_budgets(tmp_path, capfd, still):
    register(Fails, how="never ends", at=41)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 1
    assert one_line(capfd.readouterr(), "600", "max_episode_steps", "episode 3")
    assert len(digits(tmp_path)[0]) <= 2


def test_an_evaluation_without_end_stops_at_ten_times_the_longest_of_training(still):
    """Training has three episodes of 20 steps, so each of the ten takes 200."""
    env = Fails("never ends", at=61)
    agent = trained(env, steps=60)
    assert len(list(ddpg.evaluate(agent, env))) == 10 and env.lived == 60 + 10 * 200


def test_results_that_were_not_written_are_written_on_resume(whole, tmp_path, monkeypatch):
    register()
    with monkeypatch.context() as patch:
        patch.setattr(ddpg, "plot", lambda history: signal.raise_signal(signal.SIGINT))
        assert ddpg_py(*SHORT, "--out", tmp_path) == 130
    assert ddpg_py("--resume", "--out", tmp_path) == 0
    assert set(contents(tmp_path)) == set(contents(whole))
    assert same(digits(tmp_path), digits(whole))


@pytest.mark.parametrize("function", ["savez", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_save_that_breaks_leaves_the_last_checkpoint(
        function, error, whole, tmp_path, monkeypatch, capfd):
    """The third one, half-written. The first is that of no episode, the second that of one."""
    saves, where = [], {"savez": np, "replace": Path}[function]
    usual = getattr(where, function)

    def breaks(target, *arrays, **named):
        saves.append(target)
        if len(saves) == 3:
            Path(target).write_bytes(b"half")
            raise error
        return usual(target, *arrays, **named)

    register()
    with monkeypatch.context() as patch:
        patch.setattr(where, function, breaks)
        status, captured = ddpg_py(*SHORT, "--out", tmp_path), capfd.readouterr()
    assert status == (1 if isinstance(error, OSError) else 130)
    assert status == 130 or one_line(captured, "checkpoint.npz", "No space left", "--out")
    assert len(saves) == 3 and len(digits(tmp_path)[0]) == 1
    assert ddpg_py("--resume", "--out", tmp_path) == 0
    assert same(digits(tmp_path), digits(whole))
    assert set(contents(tmp_path)) == set(contents(whole)), "something is left over"


@pytest.mark.parametrize("seconds, longest", [(0, 20), (3, 60)])
def test_the_last_checkpoint_is_20_seconds_or_20_saves_old(
        seconds, longest, tmp_path, monkeypatch, still):
    """And an episode of 2 steps: each takes a second, and a save `seconds`, of this clock. Less than
    a tenth of the time goes into saving."""
    saved, save, env = [], ddpg.save, Line(length=2)

    def slow_save(agent, path):
        save(agent, path)
        saved.append(now() + seconds)

    def now():
        return env.lived + seconds * len(saved)

    monkeypatch.setattr(ddpg, "time", types.SimpleNamespace(monotonic=now))
    monkeypatch.setattr(ddpg, "save", slow_save)
    ddpg.run(small(env, steps=400), env, tmp_path)
    gaps = np.diff(saved)
    assert max(gaps) <= longest + 2 + seconds and np.median(gaps) >= max(8, 10 * seconds)


@pytest.mark.parametrize("more, length, options", [
    (120, 20, ["--noise-theta", 0.15]), (100, 7, ["--buffer-size", 30])])
def test_more_steps_on_resume_are_a_longer_run(more, length, options, tmp_path):
    register(length=length)
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert ddpg_py(*SHORT, *options, "--steps", more, "--out", once) == 0
    assert ddpg_py(*SHORT, *options, "--out", twice) == 0
    assert ddpg_py("--resume", "--steps", more, "--out", twice) == 0
    assert same(digits(once), digits(twice))


def test_resuming_costs_no_digit_after_the_units_rest_and_the_ring_has_wrapped(
        tmp_path, monkeypatch):
    """The states that were measured are no longer in the memory. Instead of learning there is
    something fast that depends on memory, units and random numbers as well."""
    def learn(agent, batches):
        agent.actor.variables[-1].assign([np.mean(batches[0][0] + batches[2][0])])
        return 0.0

    monkeypatch.setattr(ddpg.Agent, "learn", learn)
    register(length=500)
    long, once, twice = [*SHORT, "--buffer-size", 3000], tmp_path / "once", tmp_path / "twice"
    assert ddpg_py(*long, "--steps", 14_500, "--out", once) == 0
    assert ddpg_py(*long, "--steps", 13_500, "--out", twice) == 0
    assert ddpg_py("--resume", "--steps", 14_500, "--out", twice) == 0
    assert same(digits(once), digits(twice))
    _, rows, mean, *_ = digits(once)
    assert len(rows) == 3000 and not np.isclose(mean, rows[:, 0].mean(), rtol=1e-3)


@pytest.mark.parametrize("name, at_rest", [("actor", [0, 1, 2, 3]), ("critic", [4, 5, 6, 7])])
def test_what_is_given_anew_on_resume_wins(name, at_rest, whole, copy):
    """A learning rate of 0: one network rests. No noise: the next action is mu(s)."""
    anew = [f"--{name}-lr", 0, "--noise", 0, "--steps", 80]
    assert ddpg_py("--resume", "--out", copy, *anew) == 0
    settings = [vars(ddpg.read(path / "checkpoint.npz")[0]) for path in (whole, copy)]
    assert settings[1] == settings[0] | {f"{name}_lr": 0, "noise": 0, "steps": 80}
    _, _, mean, deviation, *before = digits(whole)
    _, rows, _, _, *after = digits(copy)
    for i in range(8):
        assert np.array_equal(before[i], after[i]) == (i in at_rest)
    s, a = rows[60, :2]
    assert a == pytest.approx(ddpg.mu(before[:4], (s - mean) / deviation).item(), abs=1e-5)


@pytest.mark.parametrize("option", ["--resume", "--gif"])
@pytest.mark.parametrize("name, value", [("env", "Pendulum-v1"), ("seed", "1"), ("hidden", "5"),
                                         ("buffer-size", "999")])
def test_what_belongs_to_the_run_may_be_repeated_but_not_changed(
        option, name, value, whole, capfd):
    before = contents(whole)
    assert ddpg_py(*SHORT, "--seed", 0, option, "--out", whole, f"--{name}", value) == 2
    assert one_line(capfd.readouterr(), value, whole, name.replace("-", "_"))
    assert contents(whole) == before


@pytest.mark.parametrize("spaces", [
    {"observation_space": gym.spaces.Box(0, 255, (4, 4), np.uint8)},
    {"observation_space": gym.spaces.Dict(x=gym.spaces.Box(-1, 1, (1,)))},
    {"observation_space": gym.spaces.Discrete(3)}, {"action_space": gym.spaces.Discrete(3)},
    {"action_space": gym.spaces.MultiBinary(3)}, {"action_space": gym.spaces.Box(-1, 1, (2, 2))},
    {"action_space": gym.spaces.Box(-2, 2, (1,), np.int64)},
    {"action_space": gym.spaces.Box(-np.inf, 1, (1,))}], ids=str)
def test_unfit_spaces_are_refused_in_one_line(spaces, tmp_path, capfd):
    register(spaces=spaces)
    assert ddpg_py(*SHORT, "--out", tmp_path / "out") == 2
    named = [str(space)[:10] for space in spaces.values()]
    assert one_line(capfd.readouterr(), *named, "one dimension", "wrap")
    assert contents(tmp_path) == {}


def test_a_state_of_another_shape_than_its_space_is_refused_before_training(tmp_path, capfd):
    register(spaces={"observation_space": gym.spaces.Box(-1, 1, (3,))})
    assert ddpg_py(*SHORT, "--out", tmp_path / "out") == 2
    assert one_line(capfd.readouterr(), "(1,)", "(3,)") and contents(tmp_path) == {}


def not_installed(**_):
    raise gym.error.DependencyNotInstalled('run `pip install "gymnasium[extra]"`')


@pytest.mark.parametrize("options, named", [
    *[([f"--{name}", value], [name[:5], value]) for name, values in {
        "steps": ["0", "-3", "many"], "seed": ["-1", "2147483648"], "hidden": ["0", "8.5"],
        "batch-size": ["0"], "buffer-size": ["0"], "warmup": ["0"], "block": ["0"],
        "gamma": ["1.01", "-0.1", "nan"], "tau": ["1.01", "-0.1"], "noise-theta": ["1.01", "-0.1"],
        "noise": ["-0.1", "inf"], "actor-lr": ["-0.001", "inf"], "critic-lr": ["-0.001"]
    }.items() for value in values],
    (["--steps", "300", "--warmup", "300"], ["steps", "300", "warmup"]), (["--hidden"], ["hidden"]),
    *[(["--env", env], ["--env"]) for env in (
        "Nowhere-v0", "nowhere:Nowhere-v0", "sys:Nowhere-v0", "Pendulum", "a:b:c", ":Test-v0")],
    (["--env", "Extra-v0"], ["--env", "gymnasium[extra]"]),
    (["--resume"], ["checkpoint.npz", "--out"]), (["--gif"], ["checkpoint.npz", "--out"]),
    (["--frobnicate"], ["--frobnicate"]), (["--step", "300"], ["--step"])], ids=str)
def test_bad_input_gets_one_line_and_leaves_nothing(options, named, tmp_path, capfd):
    register(not_installed, name="Extra-v0")
    assert ddpg_py(*options, "--out", tmp_path / "out") == 2
    captured = capfd.readouterr()
    assert one_line(captured, *named) and captured.out == "" and contents(tmp_path) == {}


def test_a_folder_that_cannot_be_used_is_refused_before_training(tmp_path, capfd, still):
    register()
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/nowhere")):
        assert ddpg_py(*SHORT, "--out", out) == 2
        assert one_line(capfd.readouterr(), out)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("option", ["--resume", "--gif", "--seed=0"])
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "of few arrays", "of objects",
                                    "of another version"])
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(damage, option, copy, capfd):
    path, ours = copy / "checkpoint.npz", json.dumps({"settings": {}, "history": [[1, 2.0]]})
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[:-100 if damage == "cut" else 0])
    else:
        np.savez(path, np.ones(3), **{
            "foreign": {}, "of few arrays": {"rest": ours}, "of objects": {"rest": np.array([{}])},
            "of another version": {"rest": ours.replace("{}", '{"colour": "red"}')}}[damage])
    before = contents(copy)
    assert ddpg_py(option, "--out", copy) == 2
    assert one_line(capfd.readouterr(), copy) and contents(copy) == before


@pytest.mark.parametrize("option", ["--resume", "--gif"])
def test_a_checkpoint_of_other_sizes_is_refused_in_few_words(option, copy, capfd):
    register(size=30)
    before = contents(copy)
    assert ddpg_py(option, "--out", copy) == 2
    assert one_line(capfd.readouterr(), "sizes", "--out") and contents(copy) == before


def test_help_names_every_setting_and_its_default(capsys):
    assert ddpg_py("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(ddpg.make_settings()).items():
        section = text.split(f" --{name.replace('_', '-')} ")[1]
        assert section.split("(default: ")[1].startswith(f"{value})"), name
    assert all(option in text for option in ("--out", "--resume", "--gif"))


def test_a_gif_shows_one_episode_without_noise(copy, capfd):
    """A picture of the start and one after each of the 20 steps, 1000 / 50 ms each."""
    assert ddpg_py("--gif", "--out", copy) == 0
    with Image.open(copy / "policy.gif") as picture:
        assert picture.n_frames == 21 and picture.info["duration"] == 20
    agent = small(steps=60, warmup=20)
    ddpg.restore(agent, *ddpg.read(copy / "checkpoint.npz")[1:])
    assert f"return {next(ddpg.evaluate(agent, Line())):.5g}" in capfd.readouterr().out


@pytest.mark.parametrize("env", ["Pendulum-v1", "LunarLanderContinuous-v3"])
def test_a_gif_needs_no_display(env, tmp_path, monkeypatch):
    """As if the longest episode of training had had 2 steps: this one ends after 20."""
    if env.startswith("Lunar"):
        pytest.importorskip("Box2D")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    agent = ddpg.Agent(gym.make(env), ddpg.make_settings(env=env, hidden=[4], buffer_size=10))
    agent.history, agent.buffer.added = [[2, 0.0]], 2
    ddpg.save(agent, tmp_path / "checkpoint.npz")
    assert ddpg_py("--gif", "--out", tmp_path) == 0
    with Image.open(tmp_path / "policy.gif") as picture:
        assert 15 < picture.n_frames <= 21


def test_what_cannot_be_drawn_says_so_in_one_line(copy, capfd):
    register(Blind)
    before = contents(copy)
    assert ddpg_py("--gif", "--out", copy) in (1, 2)
    assert one_line(capfd.readouterr(), "Test-v0") and contents(copy) == before


def start(code, *options, preexec_fn=None):
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, options)], cwd="/", preexec_fn=preexec_fn,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
            **os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(HERE),
            "KERAS_BACKEND": "jax", "TF_ENABLE_ONEDNN_OPTS": "0"})


def stop(process, text, number):
    """Send this signal after this text was printed. Returns what was printed later."""
    seen = ""
    while text not in seen:
        byte = process.stdout.read(1)
        assert byte, process.stderr.read()
        seen += byte
    process.send_signal(number)
    return finish(process, {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[number])


def finish(process, status=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == status and "Traceback" not in err, err
    return out, err


LONG = ["--hidden", 8, "--batch-size", 16, "--warmup", 100, "--steps", 2400]
SCRIPT = """
import os, runpy, signal, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
before = os.listdir(), signal.getsignal(signal.SIGINT)
import ddpg
assert (os.listdir(), signal.getsignal(signal.SIGINT)) == before
assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0" and ddpg.plt.get_fignums() == []
assert ddpg.tf.config.threading.get_intra_op_parallelism_threads() == 0
print("the import left all as it was")
runpy.run_path(ddpg.__file__, run_name="__main__")
"""
OFTEN = "import sys, ddpg; ddpg.SAVE_EVERY = 0; sys.exit(ddpg.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """`python ddpg.py` was started, with this folder."""
    folder = tmp_path_factory.mktemp("script")
    process = start(SCRIPT, *LONG, "--out", folder)
    yield process, folder
    process.kill()


def test_digits_survive_kills_ctrl_c_and_a_full_disk(script, tmp_path):
    """Of two runs, side by side. At 60,000 bytes (that is episode 7 or so) the second disk is full.
    In the end the first has no standard error any more."""
    one, two = ["--out", tmp_path / "one"], ["--out", tmp_path / "two"]
    first, second = start(OFTEN, *LONG, *one), start(OFTEN, *LONG, *two)
    stop(first, "episode 3,", signal.SIGKILL)
    out, _ = stop(second, "episode 4,", signal.SIGINT)
    assert "--resume" in out.splitlines()[-1]

    first = start(OFTEN, "--resume", *one)
    second = start(OFTEN, "--resume", *two, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (60_000, 60_000)))
    stop(first, "episode 8,", signal.SIGKILL)
    _, err = finish(second, 1)
    assert err.splitlines()[-1].startswith("ddpg.py: ") and "checkpoint.npz" in err
    assert len(digits(tmp_path / "two")[0]) in range(4, 12)

    first = start(OFTEN, "--resume", *one, preexec_fn=lambda: os.close(2))
    second = start(OFTEN, "--resume", *two)
    outs = [finish(process)[0] for process in (first, second, script[0])]
    assert "episode 2," not in outs[0] + outs[1], "it started again"
    assert "the import left all as it was" in outs[2]
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert same(digits(folder), digits(script[1])) and len(contents(folder)) == 4
        assert (folder / "returns.csv").read_bytes() == (script[1] / "returns.csv").read_bytes()


def test_the_saved_actor_is_the_average_one_in_a_python_without_our_code(tmp_path):
    """On raw states of 1000 +- 1, and with actions between -1 and 2, 3 and 7."""
    env = Line(low=(-1, 3), high=(2, 7), size=3, shift=1000)
    agent = trained(env, steps=60, noise=0.5)
    ddpg.policy(agent).save(tmp_path / "actor.keras")
    states = (1000 + np.random.default_rng(0).uniform(-1, 1, (5, 3))).astype(np.float32)
    plain = subprocess.run(
        [sys.executable, "-c", "import json, keras, sys; states = json.loads(sys.argv[2]);"
         "print(keras.models.load_model(sys.argv[1])(keras.ops.array(states)).numpy().tolist())",
         tmp_path / "actor.keras", json.dumps(states.tolist())], capture_output=True, check=True,
        cwd="/", env={**os.environ, "KERAS_BACKEND": "tensorflow"})
    average = agent.average_actor(agent.buffer.standard(states)).numpy()
    loaded = np.array(json.loads(plain.stdout))
    np.testing.assert_allclose(loaded, [0.5, 5] + [1.5, 2] * average, atol=2e-3)
    assert np.ptp(average, axis=0).min() > 0.02 and not np.allclose(
        average, agent.actor(agent.buffer.standard(states)), atol=0.01)


def test_the_readme_and_the_program_agree():
    """Cited sections, named tests and flags exist; excerpts are verbatim."""
    readme, program = (HERE / "README.md").read_text(), (HERE / "ddpg.py").read_text()
    cited = set(re.findall(r"section (\d+)", program))
    assert cited and cited <= set(re.findall(r"^## (\d+)\.", readme, re.M))
    excerpts = [code for code in re.findall(r"```python\n(.*?)```", readme, re.S)
                if not code.startswith("import")]
    assert len(excerpts) >= 5 and [code for code in excerpts if code not in program] == []
    assert set(re.findall(r"`(test_\w+)`", readme)) <= set(globals())
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", readme)):
        assert flag.replace("-", "_") in {*ddpg.OPTIONS, "out", "resume", "gif", "help"}, flag


def test_the_readmes_mathematics_is_in_the_form_that_github_always_shows():
    """Formulas of their own in ```math, others in $`...`$: else Markdown reads them first."""
    text = re.sub(r"^```.*?^```", "", (HERE / "README.md").read_text(), flags=re.M | re.S)
    rest = re.sub(r"`[^`]*`", "", re.sub(r"\$`[^`]*`\$", "", text))
    assert "$" not in rest, re.findall(r".{0,30}\$.{0,30}", rest)[:3]
