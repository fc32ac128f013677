"""Statements about DDPG, then about the program around it. `python -m pytest` runs them."""

import contextlib
import json
import os
import re
import resource
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
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation", "ignore:.*render_mode")
tf.config.threading.set_intra_op_parallelism_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is heard, whatever the shell set
MACHINE_CODE = ddpg.Agent.learn
ddpg.Agent.learn = tf.function(MACHINE_CODE.python_function)  # a second less for each Agent


class Line(gym.Env):
    """x' = keep x + push a, reward -price (x^2 + effort a^2), x0 in [-1, 1]; `length` steps long.
    The state is scale x + shift, `size` times, all but the first at rest until step `wakes`."""

    def __init__(self, low=(-2,), high=(2,), length=20, terminates=False, size=1, keep=1, push=1,
                 effort=1, price=1, scale=1, shift=0, wakes=0, observations=None, actions=None):
        self.action_space = actions or gym.spaces.Box(np.float32(low), np.float32(high))
        self.observation_space = observations or gym.spaces.Box(-np.inf, np.inf, (size,))
        self.length, self.terminates, self.keep, self.push = length, terminates, keep, push
        self.effort, self.price, self.wakes = effort, price, wakes
        self.scale, self.shift = scale, shift
        self.state, self.actions = np.zeros(size, np.float32), []  # the actions of all episodes

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.x = 0, self.np_random.uniform(-1, 1)
        return self.see(), {}

    def see(self):
        self.state[:] = self.shift
        self.state[:1 if len(self.actions) < self.wakes else None] += self.scale * self.x
        return self.state  # the same array every time, as fast environments do

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        reward = -self.price * float(self.x**2 + self.effort * action[0] ** 2)
        self.x, self.steps = self.keep * self.x + self.push * float(action[0]), self.steps + 1
        over = self.steps == self.length
        return self.see(), reward, over and self.terminates, over and not self.terminates, {}


class Fails(Line):
    """A Line in which something is wrong in step `at` of its life, and from then on."""

    def __init__(self, how, at, **arguments):
        super().__init__(**arguments)
        self.how, self.at = how, at

    def step(self, action):
        state, reward, *over, info = super().step(action)
        if len(self.actions) < self.at:
            return state, reward, *over, info
        if self.how == "Ctrl-C" and len(self.actions) == self.at:
            signal.raise_signal(signal.SIGINT)
        if self.how == "raises":
            raise RuntimeError("unplugged")
        if self.how == "never ends":
            over = [False, False]
        if self.how == "says arrays":
            reward, *over = [np.array([value]) for value in (reward, *over)]
        state = {"state nan": state * np.nan, "state of two": np.zeros(2)}.get(self.how, state)
        reward = {"None": None, "-inf": -np.inf, "1e39": 1e39, "two": [1, 2]}.get(self.how, reward)
        return state, reward, *over, info


def small(environment=None, **changes):
    """An agent with small networks and a short warm-up, for a Line unless told otherwise."""
    changes = {"hidden": [4], "batch_size": 4, "warmup": 4, "block": 4, "steps": 100,
               "buffer_size": 1000} | changes
    return ddpg.Agent(environment or Line(), ddpg.make_settings(**changes))


def trained(env, **changes):
    agent = small(env, **changes)
    list(ddpg.train(agent, env))
    return agent


def by_hand(**changes):
    """Linear networks with numbers to calculate with: mu(s) = tanh(s), Q = s + 6 a + 1,
    mu'(1) = 1/2 = -mu'(-1), Q' = 2 s + 2 a."""
    agent = small(hidden=[], gamma=0.5, **changes)
    agent.actor.set_weights([np.array([[1.0]]), np.array([0.0])])
    agent.critic.set_weights([np.array([[1.0], [6.0]]), np.array([1.0])])
    agent.target_actor.set_weights([np.array([[np.arctanh(0.5)]]), np.array([0.0])])
    agent.target_critic.set_weights([np.array([[2.0], [2.0]]), np.array([0.0])])
    return agent


def random_batches(k, n):
    """k batches of n random transitions of a Line, as learn takes them."""
    return list(np.random.default_rng(0).normal(size=(5, k, n, 1)).astype(np.float32))


def remembered(agent):
    """s, a, r, s', d of the steps so far, a column or more of each."""
    return np.split(agent.buffer.rows[:agent.buffer.added], agent.buffer.ends, axis=1)


def flat(network):
    return np.concatenate([weight.ravel() for weight in network.get_weights()]).tolist()


def numbers(agent):
    """All that learning changes."""
    return [np.asarray(variable) for variable in ddpg.variables(agent)]


def same(first, second):
    """Whether two lists of arrays are equal to the last digit."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def still(monkeypatch):
    """The networks stay as they are."""
    monkeypatch.setattr(ddpg.Agent, "learn", lambda agent, batches: 0.0)


def test_critic_loss_equals_the_sum_done_by_hand():
    """y = r + 0.5 (1 - d) Q': 1 + 0.5 (2 + 1) = 2.5, 2 (terminated), 3 + 0.5 (-2 - 1) = 1.5.
    Q = s + 6 a + 1: 1, 5, 0.  L = (1.5^2 + 3^2 + 1.5^2) / 3 = 4.5."""
    s, a, r, s_next, d = np.float32(
        [[0, 1, 2], [0, 0.5, -0.5], [1, 2, 3], [1, 2, -1], [0, 1, 0]])[:, :, None]
    assert float(by_hand().critic_loss(s, a, r, s_next, d)) == pytest.approx(4.5)


def test_actor_loss_is_minus_the_mean_value_of_its_actions_and_a_toll_where_tanh_is_flat():
    """Q(s, mu(s)) = s + 6 tanh(s) + 1 at s = 1, -2, 20 and -19: the last two cost 15^2 and 14^2."""
    values = [2 + 6 * np.tanh(1), -1 - 6 * np.tanh(2), 27, -24]
    loss = by_hand().actor_loss(np.float32([[1], [-2], [20], [-19]]))
    assert float(loss) == pytest.approx(-np.mean(values) + (15**2 + 14**2) / 4)


def test_actor_gradient_is_the_chain_rule_and_raises_q():
    """The tape's gradient of J equals -1/N sum dQ/da dmu/dtheta, dQ/da computed apart, fed in."""
    agent = small(Line(low=(-1, -3), high=(2, 5), size=3))
    s = tf.constant(np.random.default_rng(0).normal(size=(5, 3)), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        loss, a = agent.actor_loss(s), agent.actor(s)
        q = agent.critic(tf.concat([s, a], axis=1))
    theta = agent.actor.trainable_variables
    direct, dq_da = tape.gradient(loss, theta), tape.gradient(q, a)
    fed_in = tape.gradient(a, theta, output_gradients=-dq_da / 5)
    for weight, one, other in zip(theta, direct, fed_in, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        weight.assign(weight - 0.01 * one)
    assert np.mean(agent.critic(tf.concat([s, agent.actor(s)], axis=1))) > np.mean(q)


def test_targets_and_average_start_as_copies_that_do_not_move_along():
    agent = small(Line(size=3), hidden=[5, 7])  # the critic has 3 + 1 inputs
    for leader, followers, size in ((agent.actor, (agent.target_actor, agent.average_actor), 3),
                                    (agent.critic, (agent.target_critic,), 4)):
        before = leader.get_weights()
        assert [w.shape for w in before] == [(size, 5), (5,), (5, 7), (7,), (7, 1), (1,)]
        leader.set_weights([weight + 1 for weight in before])
        assert all(same(before, follower.get_weights()) for follower in followers)


def test_a_step_moves_the_critic_then_the_actor_then_what_follows_them():
    """The first step of Adam moves a weight by its rate. Q = a / 2 is above y = -9 at s = a = 1, so
    each weight of the critic falls by 1. As Q falls with a from now on, the actor, 0 before, falls
    by 0.1. Targets, 0 before, keep 3/4 of themselves; the average 1/5, and 2/6 in the next step."""
    agent = by_hand(critic_lr=1.0, actor_lr=0.1, tau=0.75)
    agent.critic.set_weights([np.array([[0.0], [0.5]]), np.array([0.0])])
    for network in (agent.actor, agent.target_actor, agent.target_critic, agent.average_actor):
        network.set_weights([0 * weight for weight in network.get_weights()])
    batches = [np.full((1, 4, 1), value, np.float32) for value in (1, 1, -9, 1, 1)]
    agent.learn(batches)
    for network, expected in ((agent.critic, [-1, -0.5, -1]), (agent.actor, [-0.1, -0.1]),
                              (agent.target_critic, [-0.25, -0.125, -0.25]),
                              (agent.target_actor, [-0.025, -0.025]),
                              (agent.average_actor, [-0.08, -0.08])):
        assert flat(network) == pytest.approx(expected, rel=1e-3)
    agent.learn(batches)
    expected = 2 / 6 * -0.08 + 4 / 6 * np.array(flat(agent.actor))
    assert flat(agent.average_actor) == pytest.approx(expected, rel=1e-3)


def test_a_block_of_steps_equals_blocks_of_one_compiled_or_not():
    together, apart, batches = small(tau=0.9), small(tau=0.9), random_batches(3, 4)
    MACHINE_CODE(together, batches)
    for i in range(3):
        MACHINE_CODE.python_function(apart, [piece[i:i + 1] for piece in batches])
    for one, other in zip(numbers(together), numbers(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["the critic's loss", "the actor's loss", "a weight"])
def test_what_is_not_finite_is_noticed_wherever_in_a_block_it_was(what):
    """The square of 3e19 and that of a toll overflow, but their gradients do not: the weights stay
    finite. In the one step of a learning rate without end, it is the losses that are finite."""
    agent, batches = by_hand(), random_batches(2 if what == "the critic's loss" else 1, 16)
    if what == "the critic's loss":
        batches[2][0, 0] = 3e19
    elif what == "the actor's loss":
        agent.actor.set_weights([np.array([[0.0]]), np.array([-3e19])])
    else:
        agent.actor.optimizer.learning_rate = np.inf
    assert not np.isfinite(agent.learn(batches))
    assert np.isfinite(flat(agent.actor) + flat(agent.critic)).all() == (what != "a weight")


def test_buffer_keeps_the_newest_rows_and_draws_each_as_often():
    """10,000 draws from the last 10 of 25 rows: 1,000 of each, with standard deviation 30."""
    buffer, rng = ddpg.ReplayBuffer(10, 1, 1), np.random.default_rng(1)
    for i in range(25):
        buffer.add([i], [100 + i], 200 + i, [300 + i], i % 2 == 0)
        assert buffer.sample(rng, 50)[1].min() >= 100, "a row that is not filled was drawn"
    drawn, counts = np.unique(np.dstack(buffer.sample(rng, 100, 100)).reshape(-1, 5), axis=0,
                              return_counts=True)
    expected = [[i, 100 + i, 200 + i, 300 + i, i % 2 == 0] for i in range(15, 25)]
    np.testing.assert_array_equal(drawn, expected)
    assert np.abs(counts - 1000).max() < 120


@pytest.mark.parametrize("states, mean, deviation", [
    ([2, 4, 9], 5, np.sqrt((9 + 1 + 16) / 3)), ([999e-6, 1001e-6], 1e-3, 1e-6), ([0], 0, 1),
    ([0.1], 0.1, 1), ([1e6, 1e6 + 0.0625], 1e6, 1)])  # neighbours in float32
def test_measuring_finds_mean_and_deviation_and_1_for_what_never_moved(states, mean, deviation):
    """Of the states in the memory: not of next ones, nor of one that the ring has overwritten.
    Of rewards, here the same numbers, it finds the root mean square, and 1 if all are 0."""
    buffer = ddpg.ReplayBuffer(3000, 2, 1)
    for s in [1000, *states * (3000 // len(states))]:
        buffer.add([s, -s], [0], s, [500, 500], False)
    buffer.measure()
    assert buffer.mean.tolist() == pytest.approx([mean, -mean])
    assert buffer.deviation.tolist() == pytest.approx([deviation, deviation], rel=1e-3)
    assert buffer.reward_size == pytest.approx(np.sqrt(np.mean(np.square(states))) or 1)


@pytest.mark.parametrize("warmup, block, steps, measured", [
    (8, 4, 26, 24), (100, 2500, 13_000, 10_100)])
def test_states_are_measured_at_each_block_to_step_10000(warmup, block, steps, measured, still):
    """Of those after the warm-up: in blocks to 8, 12, ... 24 and to 100, 2600, ... 10100."""
    agent = trained(Line(length=13, scale=3, shift=1000), warmup=warmup, block=block, steps=steps,
                    buffer_size=steps)
    states = remembered(agent)[0][:measured]
    np.testing.assert_allclose(agent.buffer.mean, states.mean(dtype=float), rtol=1e-9)
    np.testing.assert_allclose(agent.buffer.deviation, states.std(dtype=float), rtol=1e-9)


@pytest.mark.parametrize("scale, price", [(4, 1), (1 / 64, 1), (1, 4), (1, 1 / 64)])
def test_an_environment_in_other_units_gives_the_same_digits(scale, price):
    """A power of two is exact in floating point, for states and for rewards."""
    one, other = (trained(Line(scale=x, price=y), warmup=8, steps=60)
                  for x, y in ((1, 1), (scale, price)))
    assert np.array_equal(remembered(other)[0], scale * remembered(one)[0])
    assert [[step, price * total] for step, total in one.history] == other.history
    assert same(numbers(one), numbers(other))


@pytest.mark.parametrize("constant", [0, 0.1])
@pytest.mark.parametrize("wakes", [10**9, 22])
def test_an_environment_trains_though_a_number_rests_or_rested_at_first(constant, wakes):
    agent = trained(Line(size=2, shift=constant, wakes=wakes), warmup=20, steps=60)
    assert (agent.buffer.deviation[1] == 1) == (wakes > 60)  # (what is not finite raises an error)
    assert np.all(np.abs(agent.buffer.sample(np.random.default_rng(0), 200)[0]) < 10)


@pytest.mark.parametrize("theta", [1.0, 0.15])
def test_noise_has_the_deviation_and_memory_of_theory(theta, still):
    """n is autoregressive: correlation rho = 1 - theta, deviation sigma / sqrt(1 - rho^2).
    Eight numbers an action, of an actor that says 0, so that a = n."""
    def noise(length):
        env = Line(low=[-1] * 8, high=[1] * 8, length=length, push=0)
        agent = small(env, noise=0.1, noise_theta=theta, steps=4000, buffer_size=4000)
        agent.actor.set_weights([0 * weight for weight in agent.actor.get_weights()])
        list(ddpg.train(agent, env))
        return remembered(agent)[1][agent.settings.warmup:]
    rho, n, first = 1 - theta, noise(4000), noise(1)
    assert n.std() == pytest.approx(0.1 / np.sqrt(1 - rho**2), rel=0.05)
    assert np.corrcoef(n[1:].ravel(), n[:-1].ravel())[0, 1] == pytest.approx(rho, abs=0.02)
    assert np.abs(np.corrcoef(n.T) - np.eye(8)).max() < 0.2, "dimensions share their noise"
    assert first.std() == pytest.approx(0.1, rel=0.05), "n does not start from 0 in each episode"
    assert len(np.unique(first)) > 30_000, "episodes share their noise"


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
    low, high = np.sort(np.random.default_rng(0).normal(size=(2, 1000)), axis=0).astype(kind)
    low[0], high[0] = -3e38, 3e38
    space = gym.spaces.Box(low, high, dtype=kind)
    for a, expected in ((-1.0, low), (0.0, low / 2 + high / 2), (1.0, high)):
        action = ddpg.in_bounds(np.full(1000, a), space)
        assert space.contains(action)
        np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)


def test_the_loop_acts_at_random_then_by_the_online_actor_of_the_last_block():
    """200 uniform numbers in [-1, 1] have deviation 1 / sqrt(3) = 0.58. Without noise, those of the
    200 steps that follow the first block of learning are mu(s), here that of Keras."""
    env = Line(shift=100, scale=5, length=200)
    agent = small(env, noise=0, warmup=200, block=200, steps=400, hidden=[5, 4])
    run = ddpg.train(agent, env)
    next(run)
    online, mean, deviation = agent.actor.get_weights(), agent.buffer.mean, agent.buffer.deviation
    assert not same(online, agent.average_actor.get_weights())
    next(run)
    agent.actor.set_weights(online)
    s, a, *_ = remembered(agent)
    assert a[:200].std() == pytest.approx(0.58, abs=0.06) and abs(a[:200].mean()) < 0.1
    np.testing.assert_allclose(a[200:], agent.actor((s[200:] - mean) / deviation), atol=1e-5)


@pytest.mark.parametrize("terminates", [True, False])
def test_the_loop_stores_terminated_but_not_truncated(terminates, still):
    """Only what terminates loses its future: r + gamma Q' is kept for what was merely cut off."""
    s, a, r, s_next, d = remembered(trained(Line(length=3, terminates=terminates), steps=6))
    assert d.ravel().tolist() == [0, 0, terminates] * 2
    np.testing.assert_allclose(s_next, s + 2 * a, atol=1e-6)  # Line's own actions are in [-2, 2]
    np.testing.assert_allclose(r, -(s**2 + 4 * a**2), atol=1e-5)
    np.testing.assert_array_equal(s_next[:2], s[1:3])
    assert s_next[2] != s[3], "episodes run into each other"


@pytest.mark.parametrize("convert", [np.float64, np.int64, np.ndarray.tolist])
def test_states_rewards_and_ends_may_have_odd_types(convert, still):
    env = Fails("says arrays", at=1, length=3, terminates=True, scale=10)
    agent = trained(gym.wrappers.TransformObservation(env, convert, None), steps=6)
    s, _, r, s_next, d = remembered(agent)
    assert np.array_equal(s[1:3], s_next[:2]) and s.any() and d.ravel().tolist() == [0, 0, 1] * 2
    np.testing.assert_allclose([total for _, total in agent.history], [r[:3].sum(), r[3:].sum()])


@pytest.mark.parametrize("warmup, block, expected", [
    (8, 4, [8, 12, 16, 20]), (10, 5, [10, 15, 20]), (7, 1, [*range(7, 21)]), (6, 20, [6])])
def test_a_block_is_one_call_to_tensorflow(warmup, block, expected, monkeypatch):
    """After how many of the 20 steps? It has as many batches as the block has steps."""
    calls, env = {}, Line(length=10)
    agent = small(env, warmup=warmup, block=block, steps=20)
    def learn(agent, batches):
        calls[agent.buffer.added] = [piece.shape for piece in batches]
        return 0.0
    monkeypatch.setattr(ddpg.Agent, "learn", learn)
    monkeypatch.setattr(keras.Model, "__call__", None)  # not even to act
    list(ddpg.train(agent, env))
    assert calls == {added: [(block, 4, 1)] * 5 for added in expected}


def test_another_seed_gives_another_run():
    """The starts, the random actions, and the first weights, which a short run hardly moves."""
    one, again, other = (trained(Line(length=2), seed=n, steps=40, warmup=20) for n in (5, 5, 6))
    assert same(numbers(one), numbers(again)) and same(remembered(one), remembered(again))
    for first, second in zip(remembered(one)[:2], remembered(other)[:2]):
        assert len({*first[:20:2].flat, *second[:20:2].flat}) == 20, "two episodes are alike"
    assert not np.allclose(numbers(one)[0], numbers(other)[0], atol=0.1)


@pytest.mark.parametrize("how", ["state nan", "None", "-inf", "1e39", "two"])
def test_what_is_no_finite_number_never_reaches_the_memory(how, still):
    agent = small()
    with pytest.raises(ddpg.DDPGError, match="finite"):
        list(ddpg.train(agent, Fails(how, at=7)))
    assert agent.buffer.added == 6 and not agent.buffer.rows[6:].any()


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_linear_quadratic_optimum(seed, monkeypatch):
    """Riccati: no policy beats -P_5 x0^2, with P_0 = 0 and
    P_k+1 = 1 + 0.64 P_k - (0.4 P_k)^2 / (0.1 + 0.25 P_k)."""
    monkeypatch.setattr(ddpg.Agent, "learn", MACHINE_CODE)
    p = 0.0
    for _ in range(5):
        p = 1 + 0.64 * p - (0.4 * p) ** 2 / (0.1 + 0.25 * p)
    env = Line(low=(-1.2,), high=(1.2,), length=5, keep=0.8, push=0.5, effort=0.1)
    agent = ddpg.Agent(env, ddpg.make_settings(steps=2000, seed=seed))
    list(ddpg.train(agent, env))
    returns = np.array(list(ddpg.evaluate(agent, env)))
    optimum = np.array([-p * env.reset(seed=n)[0].item() ** 2 for n in ddpg.EVALUATION_SEEDS])
    assert np.all(returns <= optimum + 1e-4) and sum(returns) > 1.03 * sum(optimum)


@pytest.mark.parametrize("seed", [100, 101])
def test_a_pendulum_stands_up_within_30_episodes(seed, monkeypatch):
    """A policy that needs one swing more from each start gives -200 or less."""
    monkeypatch.setattr(ddpg.Agent, "learn", MACHINE_CODE)
    env = gym.make("Pendulum-v1")
    agent = ddpg.Agent(env, ddpg.make_settings(steps=6000, seed=seed))
    list(ddpg.train(agent, env))
    assert np.mean(list(ddpg.evaluate(agent, env))) > -170


# The program: Test-v0 is the environment that was registered last.
SHORT = ["--env", "Test-v0", "--steps", "50", "--warmup", "20", "--block", "4", "--hidden", "4",
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


@pytest.fixture
def refuses(tmp_path, capfd):
    """Whether these options give exit status 2 and one line, and leave everything as it was."""
    def refuses(*options, named):
        before = contents(tmp_path)
        assert ddpg_py(*options) == 2
        captured = capfd.readouterr()
        assert one_line(captured, *named) and captured.out == ""
        return contents(tmp_path) == before
    return refuses


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    register()
    folder = tmp_path_factory.mktemp("whole") / "a" / "b"
    assert ddpg_py(*SHORT, "--out", folder) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A folder with the checkpoint of that run."""
    register()
    (tmp_path / "checkpoint.npz").write_bytes((whole / "checkpoint.npz").read_bytes())
    return tmp_path


def goes_on(folder, whole, options=("--resume",)):
    """Whether the program then leaves in `folder` what the run that nothing stopped has left."""
    register()
    assert ddpg_py(*options, "--out", folder) == 0
    assert set(contents(folder)) == set(contents(whole)), "files are missing or left over"
    assert contents(folder)["returns.csv"] == contents(whole)["returns.csv"]
    return same(digits(folder), digits(whole))


def test_a_run_leaves_a_row_for_each_episode_and_three_more_files(whole):
    assert set(contents(whole)) == {"returns.csv", "returns.png", "actor.keras", "checkpoint.npz"}
    first, second, third = digits(whole)[0][:, 1].tolist()
    rows = [f"1,20,{first}", f"2,40,{second}", f"3,60,{third}"]
    assert (whole / "returns.csv").read_text().splitlines() == ["episode,steps,return", *rows]


def test_a_run_prints_its_progress_and_the_mean_of_ten_episodes_of_its_policy(tmp_path, capfd):
    """That is actor.keras, played here on raw states in the environment's own units."""
    register(low=(-1,), high=(2,), scale=5, shift=100, length=5)
    assert ddpg_py(*SHORT, "--steps", 58, "--out", tmp_path) == 0
    *lines, last = capfd.readouterr().out.strip().splitlines()
    returns = digits(tmp_path)[0][:, 1]
    for i in range(12):
        ten = returns[max(0, i - 9):i + 1].mean()
        for part in (f"episode {i + 1},", f"{5 * i + 5}/58", f"{returns[i]:.5g}", f"{ten:.5g}"):
            assert part in lines[i]
    env, rewards = Line((-1,), (2,), 5, scale=5, shift=100), []
    policy = keras.models.load_model(tmp_path / "actor.keras")
    for seed in ddpg.EVALUATION_SEEDS:
        s, _ = env.reset(seed=seed)
        for _ in range(5):
            s, r, *_ = env.step(np.clip(policy(s[None])[0], -1, 2).astype(np.float32))
            rewards.append(r)
    printed = [float(number) for number in re.findall(r" (-\d+\.\d*)", last)]
    assert printed == [pytest.approx(sum(rewards) / 10, rel=1e-3)] and str(tmp_path) in last
    assert len(set(rewards)) == 50, "episodes are alike"


def test_a_run_has_a_folder_that_its_env_and_seed_find_again(tmp_path, monkeypatch):
    register(name="ns/Test-v0")
    monkeypatch.chdir(tmp_path)
    options = ["--env", "sys:ns/Test-v0", "--seed", 7]
    assert ddpg_py(*SHORT, *options) == ddpg_py("--resume", *options) == 0
    assert len(contents(tmp_path / "runs" / "sys-ns-Test-v0-seed7")) == 4


def test_the_picture_is_shown_where_there_is_a_display(copy, monkeypatch):
    seen = []
    monkeypatch.setattr(ddpg.plt, "get_backend", lambda: "a window, let us say")
    monkeypatch.setattr(ddpg.plt, "show", lambda: seen.append(len(contents(copy))))
    assert ddpg_py("--resume", "--out", copy) == 0 and seen == [4], "before all was written?"


def test_the_plot_shows_the_returns_and_the_mean_of_the_last_ten():
    """Of returns 1, 2, 3 and so on, the mean of the last ten is 4.5 less than the last."""
    axes, = ddpg.plot([[200 * i, i] for i in range(1, 31)]).axes
    returns, means = (line.get_xydata().tolist() for line in axes.lines)
    assert returns == [[200 * i, i] for i in range(1, 31)]
    assert means == [[200 * i, i - 4.5] for i in range(10, 31)]


@pytest.mark.parametrize("options, named", [
    ([], ["--resume", "--out", "delete"]), (["--gif"], ["Test-v0"]),  # which cannot be drawn
    *[([option, f"--{name}", value], [name.replace("-", "_"), value])
      for option in ("--resume", "--gif") for name, value in (
          ("env", "Pendulum-v1"), ("seed", "1"), ("hidden", "5"), ("buffer-size", "999"))]])
def test_a_run_is_left_alone_by_what_does_not_fit_it(options, named, copy, refuses):
    assert refuses(*SHORT, "--seed", 0, *options, "--out", copy, named=[*named, copy])


@pytest.mark.parametrize("how, at, status, named", [
    *[("Ctrl-C", step, 130, "--resume --out") for step in (3, 20, 47, 60, 61, 250)],
    ("raises", 3, None, ""), ("raises", 50, None, ""), ("state of two", 44, 1, "(2,)"),
    ("state nan", 44, 1, "finite"), ("None", 44, 1, "finite"), ("1e39", 44, 1, "finite"),
    ("loss nan", 44, 1, "learning rates")])
def test_whatever_stops_a_run_costs_no_digit(
        how, at, status, named, whole, tmp_path, monkeypatch, capfd):
    """Training or evaluating. One that broke in its first episode is no obstacle to a new one."""
    register(Fails, how=how, at=at)
    ended, learn = None, ddpg.Agent.learn
    def breaks(agent, batches):
        diverges = how == "loss nan" and agent.buffer.added >= at
        return np.nan if diverges else learn(agent, batches)
    with contextlib.suppress(RuntimeError), monkeypatch.context() as patch:
        patch.setattr(ddpg.Agent, "learn", breaks)
        ended = ddpg_py(*SHORT, "--out", tmp_path)
    captured = capfd.readouterr()
    assert ended == status and "Traceback" not in captured.err
    assert status != 130 or f'{named} "{tmp_path}"' in captured.out.splitlines()[-1]
    assert status != 1 or one_line(captured, "episode 3", named)
    rows, all_rows = ((path / "returns.csv").read_text().splitlines() for path in (tmp_path, whole))
    assert rows == all_rows[:1 + min(at - 1, 60) // 20] and len(contents(tmp_path)) == 4
    assert goes_on(tmp_path, whole, SHORT if at == 3 else ["--resume"])


@pytest.mark.parametrize("where, function, call", [
    (np, "savez", 3), (Path, "replace", 3), (ddpg, "plot", 1)])
@pytest.mark.parametrize("error, status", [(OSError("full"), 1), (KeyboardInterrupt(), 130)])
def test_what_cannot_be_written_leaves_a_checkpoint(
        where, function, call, error, status, whole, tmp_path, monkeypatch, capfd):
    """The third save breaks, half-written (the first was that of no episode), or the picture."""
    calls, usual = [], getattr(where, function)
    def breaks(target, *arguments, **named):
        calls.append(target)
        if len(calls) < call:
            return usual(target, *arguments, **named)
        if function == "savez":
            Path(target).write_bytes(b"half")
        raise error
    register()
    with monkeypatch.context() as patch:
        patch.setattr(where, function, breaks)
        assert ddpg_py(*SHORT, "--out", tmp_path) == status
    assert status == 130 or one_line(capfd.readouterr(), tmp_path, "full", "make room")
    assert len(digits(tmp_path)[0]) == (3 if function == "plot" else 1)
    assert goes_on(tmp_path, whole)


@pytest.mark.parametrize("seconds", [0, 3])
def test_the_last_checkpoint_is_20_seconds_or_20_saves_old(seconds, tmp_path, monkeypatch, still):
    """And an episode, of 2 steps: each takes a second, and a save `seconds`. Less than a tenth of
    the time goes into saving."""
    saved, save, env = [], ddpg.save, Line(length=2)
    def slow_save(agent, path):
        save(agent, path)
        saved.append(agent.buffer.added)
    monkeypatch.setattr(ddpg, "save", slow_save)
    monkeypatch.setattr(ddpg.time, "perf_counter", lambda: len(env.actions) + seconds * len(saved))
    ddpg.run(small(env, steps=400), env, tmp_path)
    assert max(np.diff(saved)) <= 2 + max(20, 20 * seconds)
    assert np.median(np.diff(saved)) >= max(8, 9 * seconds)


def test_a_policy_that_is_not_finite_is_not_saved(tmp_path, still):
    agent = small(warmup=4)
    agent.average_actor.set_weights([np.nan * w for w in agent.average_actor.get_weights()])
    with pytest.raises(AssertionError):  # of Line, at an action that is no number
        ddpg.run(agent, Line(), tmp_path)
    assert set(contents(tmp_path)) == {"returns.csv", "returns.png", "checkpoint.npz"}


@pytest.mark.parametrize("steps, limit", [(60, 10_000), (1100, 11_000)])  # a first try is short
def test_an_episode_without_end_stops_after_ten_budgets(steps, limit, tmp_path, capfd, still):
    register(Fails, how="never ends", at=41)
    assert ddpg_py(*SHORT, "--steps", steps, "--out", tmp_path) == 1
    assert one_line(capfd.readouterr(), limit, "max_episode_steps", "episode 3")
    assert len(digits(tmp_path)[0]) <= 2


@pytest.mark.parametrize("steps, more, length, options", [
    (60, 120, 7, ["--buffer-size", 30, "--noise-theta", 0.15]),
    (11_500, 12_000, 500, ["--buffer-size", 1000, "--block", 50])])
def test_more_steps_are_a_longer_run(steps, more, length, options, tmp_path, monkeypatch):
    """The ring has wrapped; what was measured to step 10,020 is no longer in the second memory."""
    monkeypatch.setattr(ddpg.Agent, "learn", MACHINE_CODE)
    register(length=length, keep=0.9)
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert ddpg_py(*SHORT, *options, "--steps", more, "--out", once) == 0
    assert ddpg_py(*SHORT, *options, "--steps", steps, "--out", twice) == 0
    assert ddpg_py("--resume", "--steps", more, "--out", twice) == 0
    assert same(digits(once), digits(twice))


@pytest.mark.parametrize("name, at_rest", [("actor", range(4)), ("critic", range(4, 8))])
def test_what_is_given_anew_on_resume_wins(name, at_rest, whole, copy):
    """A learning rate of 0: one network rests. No noise: the next action is mu(s)."""
    assert ddpg_py("--resume", "--out", copy, f"--{name}-lr", 0, "--noise", 0, "--steps", 80) == 0
    old, new = (ddpg.read(path / "checkpoint.npz")[0] for path in (whole, copy))
    assert new == old | {f"{name}_lr": 0, "noise": 0, "steps": 80}
    (_, _, mean, deviation, _, *before), (_, rows, _, _, _, *after) = digits(whole), digits(copy)
    assert all(np.array_equal(before[i], after[i]) == (i in at_rest) for i in range(8))
    mu = ddpg.mu(before[:4], (rows[60, 0] - mean) / deviation)
    assert rows[60, 1] == pytest.approx(mu.item(), abs=1e-5)


@pytest.mark.parametrize("observations, actions, named", [
    (gym.spaces.Box(0, 255, (4, 4), np.uint8), None, ["Box(0, 255, (4, 4)"]),
    (gym.spaces.Dict(x=gym.spaces.Box(-1, 1, (1,))), None, ["Dict"]),
    (gym.spaces.Box(-1, 1, (3,)), None, ["(3,)", "(1,)"]),  # the latter is what Line's state has
    (None, gym.spaces.Discrete(3), ["Discrete(3)"]),
    (None, gym.spaces.Box(-1, 1, (2, 2)), ["(2, 2)"]),
    (None, gym.spaces.Box(-2, 2, (1,), np.int64), ["int64"]),
    (None, gym.spaces.Box(-np.inf, 1, (1,)), ["inf"])], ids=str)
def test_unfit_spaces_are_refused(observations, actions, named, tmp_path, refuses):
    register(observations=observations, actions=actions)
    assert refuses(*SHORT, "--out", tmp_path / "out", named=named)


@pytest.mark.parametrize("option, values", [
    ("steps", ["0", "-3", "many"]), ("seed", ["-1", "2147483648"]), ("hidden", ["0", "8.5"]),
    ("gamma", ["1.01", "-0.1", "nan"]), ("tau", ["1.01", "-0.1"]), ("noise", ["-0.1", "inf"]),
    ("noise-theta", ["1.01", "-0.1"]), ("actor-lr", ["-0.001", "inf"]), ("critic-lr", ["-0.001"]),
    ("batch-size", ["0"]), ("buffer-size", ["0"]), ("warmup", ["0", "20000"]), ("block", ["0"]),
    ("step", ["300"]), ("frobnicate", ["3"]), ("env", [
        "Nowhere-v0", "nowhere:Nowhere-v0", "sys:Nowhere-v0", "Missing-v0"])])
def test_bad_input_is_refused(option, values, tmp_path, refuses):
    register("nowhere:Env", name="Missing-v0")
    for value in values:
        assert refuses("--steps=20000", f"--{option}", value, "--out", tmp_path / "out",
                       named=[option[:5], value if option != "env" else "--env"])


def test_a_folder_that_cannot_be_used_is_refused_before_training(tmp_path, refuses):
    register()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        assert refuses(*SHORT, "--out", out, named=[out])
    for option in ("--resume", "--gif"):
        assert refuses(option, "--out", tmp_path / "none", named=["checkpoint.npz"])


@pytest.mark.parametrize("option", ["--resume", "--gif", "--seed=0"])
@pytest.mark.parametrize("damage", [
    "cut", "empty", "foreign", "few arrays", "objects", "another version", "other sizes"])
def test_a_damaged_or_foreign_checkpoint_is_refused(damage, option, copy, refuses):
    path, history, array = copy / "checkpoint.npz", "[[1, 2.0]]", np.ones(3)
    register(size=30 if damage == "other sizes" else 1)
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[:-100 if damage == "cut" else 0])
    elif damage != "other sizes":
        np.savez(path, *{"foreign": [array], "few arrays": ["{}", history, array],
                         "objects": [np.array([{}]), history, array],
                         "another version": ['{"colour": "red"}', history, array]}[damage])
    assert refuses(option, "--out", copy, named=["--out"])


def test_a_gif_shows_one_episode_without_a_display(tmp_path, monkeypatch, capfd):
    """As if no episode of training had had more than 2 steps: this one is cut off after 20."""
    monkeypatch.delenv("DISPLAY", raising=False)
    env = gym.make("Pendulum-v1")
    agent = ddpg.Agent(env, ddpg.make_settings(hidden=[4], buffer_size=10))
    agent.history, agent.buffer.added = [[2, 0.0]], 2
    ddpg.save(agent, tmp_path / "checkpoint.npz")
    assert ddpg_py("--gif", "--out", tmp_path) == 0
    with Image.open(tmp_path / "policy.gif") as picture:
        assert picture.n_frames == 21 and picture.info["duration"] == 30
    assert f"return {next(ddpg.evaluate(agent, env)):.5g}" in capfd.readouterr().out


LONG = ["--hidden", 8, "--batch-size", 16, "--warmup", 100, "--steps", 2400]
PROGRAM = """
import itertools, os, signal, sys
before = os.listdir(), signal.getsignal(signal.SIGINT), os.environ["TF_CPP_MIN_LOG_LEVEL"]
import ddpg
assert before == (os.listdir(), signal.getsignal(signal.SIGINT), "0")
killed_at, steps, in_bounds = int(sys.argv[1]), itertools.count(1), ddpg.in_bounds
def counted(a, space):
    if next(steps) == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return in_bounds(a, space)
ddpg.in_bounds, ddpg.SAVE_EVERY = counted, 0
sys.exit(ddpg.main(sys.argv[2:]))
"""


def start(out, *options, killed_at=0, preexec_fn=None):
    """`python ddpg.py --out out` with these options, killed at a step."""
    variables = {"PYTHONPATH": str(HERE), "MPLBACKEND": "agg", "KERAS_BACKEND": "jax",
                 "TF_CPP_MIN_LOG_LEVEL": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, [killed_at, "--out", out, *options])], cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn,
        env=os.environ | variables)


def end(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in err, err
    return out, err


def test_digits_survive_kills_and_a_full_disk(tmp_path):
    """Three runs side by side: one is left alone, one is killed twice and then has no standard
    error, one is killed and then has room for two episodes more."""
    alone, one, two = tmp_path / "alone", tmp_path / "one", tmp_path / "two"
    processes = start(one, *LONG, killed_at=650), start(two, *LONG, killed_at=450)
    whole = start(alone, *LONG)
    for process in processes:
        end(process, -signal.SIGKILL)
    room = 20_000 + (two / "checkpoint.npz").stat().st_size
    killed, full = start(one, "--resume", killed_at=750), start(
        two, "--resume", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    end(killed, -signal.SIGKILL)
    last = end(full, 1)[1].splitlines()[-1]
    assert last.startswith("ddpg.py: ") and "checkpoint.npz" in last
    processes = start(one, "--resume", preexec_fn=lambda: os.close(2)), start(two, "--resume")
    assert "episode 1," in end(whole)[0]
    for process, folder in zip(processes, (one, two)):
        assert "episode 1," not in end(process)[0], "it started again"
        assert same(digits(folder), digits(alone))


def test_the_saved_actor_is_the_average_one_in_a_python_without_our_code(tmp_path):
    """On raw states of 1000 +- 1, and with actions between -1 and 2, 3 and 7."""
    agent = trained(Line(low=(-1, 3), high=(2, 7), size=3, shift=1000), steps=60, noise=0.5)
    ddpg.policy(agent).save(tmp_path / "actor.keras")
    states = (1000 + np.random.default_rng(0).uniform(-1, 1, (5, 3))).astype(np.float32)
    code = ("import json, keras, sys; states = keras.ops.array(json.loads(sys.argv[2]));"
            "print(keras.models.load_model(sys.argv[1])(states).numpy().tolist())")
    printed = subprocess.check_output(
        [sys.executable, "-c", code, tmp_path / "actor.keras", json.dumps(states.tolist())],
        cwd="/", env=os.environ | {"KERAS_BACKEND": "tensorflow"})
    average, online = (actor(agent.buffer.standard(states)).numpy()
                       for actor in (agent.average_actor, agent.actor))
    np.testing.assert_allclose(json.loads(printed), [0.5, 5] + [1.5, 2] * average, atol=2e-3)
    assert np.ptp(average, axis=0).min() > 0.02 and not np.allclose(average, online, atol=0.01)


def test_the_readme_and_the_program_agree(capsys):
    """Of sections, tests, flags and lines; and mathematics is where Markdown does not change it."""
    readme, program = (HERE / "README.md").read_text(), (HERE / "ddpg.py").read_text()
    cited = set(re.findall(r"section (\d+)", program))
    assert cited and cited <= set(re.findall(r"^## (\d+)\.", readme, re.M))
    excerpts = re.findall(r"```python\n(.*?)```", readme[:readme.index("\n# Exercises")], re.S)
    assert len(excerpts) >= 5 and [code for code in excerpts if code not in program] == []
    assert set(re.findall(r"`(test_\w+)`", readme)) <= set(globals())
    assert ddpg_py("--help") == 0
    options = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out)) | {"help"}
    assert {name.replace("_", "-") for name in ddpg.OPTIONS} <= options
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", readme)) <= options
    text = re.sub(r"^```.*?^```|\$`[^`]*`\$|`[^`]*`", "", readme, flags=re.M | re.S)
    assert re.findall(r".{0,30}\$.{0,30}", text) == []
