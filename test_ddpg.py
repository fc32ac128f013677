"""DDPG in statements: by hand, in a world, as a program. `python -m pytest` checks all of them,
`python -m pytest -k noise` those with this word in their names."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ddpg  # first, as it silences what TensorFlow says when it starts
import gymnasium as gym
import keras
import numpy as np
import pytest
import tensorflow as tf
from gymnasium.spaces import Box, Discrete
from numpy.testing import assert_allclose
from PIL import Image
from pytest import approx, fixture, raises

HERE = Path(__file__).parent
COMPILED = ddpg.Agent.learn
parametrize = pytest.mark.parametrize
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation", "ignore:.*render_mode")
tf.config.threading.set_intra_op_parallelism_threads(1)


@fixture(scope="module", autouse=True)
def uncompiled():
    """In these tests `learn` is not compiled to machine code, which takes a second for each Agent.
    Those that are about the machine code ask for the fixture `compiled`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpg.Agent, "learn", tf.function(COMPILED.python_function))
        yield


# Part 1. DDPG by hand: numbers to check with a pencil, and no environment.
BATCH = np.float32([
    [0, 1, 2],  # s
    [0, 0.5, -0.5],  # a
    [1, 2, 3],  # r
    [1, 2, -1],  # s'
    [0, 1, 0],  # d
])[:, :, None]  # each a column, of shape (3, 1)


def test_critic_loss_equals_the_sum_done_by_hand():
    """y = r + 0.5 (1 - d) Q': 1 + 0.5 (2 + 1) = 2.5, 2 (terminated), 3 + 0.5 (-2 - 1) = 1.5.
    Q = s + 6 a: 0, 4, -1. L = (2.5^2 + 2^2 + 2.5^2) / 3 = 5.5."""
    assert float(by_hand().critic_loss(*BATCH)) == approx(5.5)


def by_hand(module=ddpg, **changes):
    """Networks to calculate with: mu(s) = tanh(s), Q = s + 6 a, mu'(1) = 1/2 = -mu'(-1),
    Q' = 2 s + 2 a; and gamma is 1/2."""
    agent = small(spaces(), module, hidden=[], gamma=0.5, **changes)
    become(agent.actor, 1)
    become(agent.critic, 1, 6)
    become(agent.target_actor, np.arctanh(0.5))
    become(agent.target_critic, 2, 2)
    return agent


def become(network, *weights):
    """A network without hidden layers gets these weights and no bias."""
    network.set_weights([np.reshape(weights, (-1, 1)), np.zeros(1)])


def small(env, module=ddpg, **changes):
    """An agent with small networks that begins to learn early."""
    usual = {"hidden": [4], "batch_size": 4, "warmup": 4, "block": 4, "steps": 100}
    return module.Agent(env, module.make_settings(**usual | changes))


def spaces(states=1, actions=1):
    """What an Agent has to know of an environment."""
    return SimpleNamespace(observation_space=Box(-np.inf, np.inf, (states,)),
                           action_space=Box(-1, 1, (actions,)))


def flat(network):
    """All weights in a row."""
    return np.concatenate([weight.ravel() for weight in network.get_weights()]).tolist()


def numbers(agent):
    """All that learning changes, by name."""
    return {name: np.array(variable) for name, variable in ddpg.learned(agent).items()}


def same(first, second):
    """Whether arrays with the same names are equal to the last digit."""
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first)


def test_doubt_lowers_q_next_by_its_distance_to_the_critic():
    """Once an episode has terminated, Q' = 3 loses 1/4 (a quarter, as Q = 4 is above it), Q' = -3
    loses 1 (as Q = -4 is below). y = 2.375, 2, 1 and L = (2.375^2 + 2^2 + 2^2) / 3."""
    agent = by_hand()
    agent.ended.assign(1)
    assert float(agent.critic_loss(*BATCH)) == approx(4.547, abs=1e-3)


def test_doubt_begins_with_the_first_transition_that_terminated():
    agent = by_hand()
    *others, d = BATCH
    began = []
    for ends in (0 * d, d, 0 * d):
        agent.gradient_step(*others, ends)
        began.append(float(agent.ended))
    assert began == [0, 1, 1]


def test_y_is_constant_for_the_gradient():
    """At s = a = 0, where Q = s + 6 a, the gradient of both weights is 0, unless through y."""
    agent = by_hand()
    agent.ended.assign(1)
    with tf.GradientTape() as tape:
        loss = agent.critic_loss(*BATCH[:, :1])
    kernel, bias = tape.gradient(loss, agent.critic.trainable_variables)
    assert not kernel.numpy().any()


def test_actor_loss_is_minus_the_mean_value_of_its_actions():
    """Q(s, mu(s)) = s + 6 tanh(s): 5.57 at s = 1, and -7.78 at s = -2."""
    loss = by_hand().actor_loss(np.float32([[1], [-2]]))
    assert float(loss) == approx(-(5.57 - 7.78) / 2, abs=0.01)


def test_penalty_is_the_square_beyond_5_where_tanh_is_flat():
    """At s = 20 and -19: (15^2 + 14^2) / 2 = 210.5, less the mean value (26 - 25) / 2."""
    loss = by_hand().actor_loss(np.float32([[20], [-19]]))
    assert float(loss) == approx(210)


def test_actor_gradient_is_the_chain_rule_and_raises_q():
    """The tape's gradient of the loss is -1/N sum dQ/da dmu/dtheta, with dQ/da computed apart."""
    agent = small(spaces(3, 2))
    s = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    theta = agent.actor.trainable_variables
    with tf.GradientTape(persistent=True) as tape:
        loss = agent.actor_loss(s)
        a = agent.actor(s)
        value = ddpg.q(agent.critic, s, a)
    dq_da = tape.gradient(value, a)
    direct = tape.gradient(loss, theta)
    chain = tape.gradient(a, theta, output_gradients=-dq_da / 5)
    for weight, one, other in zip(theta, direct, chain, strict=True):
        assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        weight.assign(weight - 0.01 * one)
    assert agent.actor_loss(s) < loss


def test_networks_have_the_hidden_layers_of_the_settings():
    """From 3 to 5 to 7 to 2 numbers, and from 3 + 2 to 5 to 7 to 1: kernels and biases."""
    agent = small(spaces(3, 2), hidden=[5, 7])
    assert agent.actor.count_params() == 15 + 5 + 35 + 7 + 14 + 2
    assert agent.critic.count_params() == 25 + 5 + 35 + 7 + 7 + 1


def test_targets_start_as_copies_that_do_not_move_along():
    agent = small(spaces())
    actor = flat(agent.actor)
    critic = flat(agent.critic)
    for weight in agent.actor.variables + agent.critic.variables:
        weight.assign(weight + 1)
    assert flat(agent.target_actor) == flat(agent.final_actor) == actor
    assert flat(agent.target_critic) == critic


def test_a_step_moves_the_critic_then_the_actor_then_the_targets():
    """The first step of Adam moves a weight by its rate. Q = a / 2 is above y = -9 at s = a = 1, so
    each weight of the critic falls by 1. As Q falls with a from now on, the actor, 0 before, falls
    by 0.1. The targets, 0 before, keep 3/4 of themselves."""
    agent = by_hand(critic_lr=1.0, actor_lr=0.1, tau=0.75)
    become(agent.critic, 0, 0.5)
    become(agent.actor, 0)
    become(agent.target_actor, 0)
    become(agent.target_critic, 0, 0)
    agent.gradient_step(*np.float32([1, 1, -9, 1, 1]).reshape(5, 1, 1))
    assert flat(agent.critic) == approx([-1, -0.5, -1], rel=1e-3)
    assert flat(agent.actor) == approx([-0.1, -0.1], rel=1e-3)
    assert flat(agent.target_critic) == approx([-0.25, -0.125, -0.25], rel=1e-3)
    assert flat(agent.target_actor) == approx([-0.025, -0.025], rel=1e-3)


def test_the_average_keeps_t_of_t_plus_4_parts_of_itself():
    """From 0 towards an actor that rests at 1: 4/5 in step 1, then 2/6 4/5 + 4/6 = 14/15."""
    agent = by_hand(actor_lr=0.0)
    become(agent.final_actor, 0)
    for expected in (4 / 5, 14 / 15):
        agent.gradient_step(*BATCH)
        assert flat(agent.final_actor) == approx([expected, 0])


@fixture
def compiled(monkeypatch):
    monkeypatch.setattr(ddpg.Agent, "learn", COMPILED)


def test_a_block_of_steps_equals_blocks_of_one_compiled_or_not(compiled):
    batches = np.random.default_rng(0).normal(size=(5, 3, 4, 1)).astype(np.float32)
    together = small(spaces(), tau=0.9)
    together.learn(list(batches))
    apart = small(spaces(), tau=0.9)
    for i in range(3):
        apart.gradient_step(*batches[:, i])
    expected = numbers(apart)
    for name, number in numbers(together).items():
        assert_allclose(number, expected[name], rtol=1e-4, atol=1e-6)


def test_buffer_keeps_the_newest_rows_and_draws_each_as_often():
    """10,000 draws from the last 10 of 25 rows: 1,000 of each, with standard deviation 30."""
    buffer = ddpg.ReplayBuffer(10, 1, 1)
    rows = [[i, 100 + i, 200 + i, 300 + i, i % 2] for i in range(25)]
    for row in rows:
        buffer.add(*row)
    columns = buffer.sample(np.random.default_rng(1), 100, 100)
    samples = np.concatenate(columns, axis=2).reshape(-1, 5)
    drawn, counts = np.unique(samples, axis=0, return_counts=True)
    assert drawn.tolist() == rows[15:]
    assert abs(counts - 1000).max() < 120


def test_a_sample_is_in_standard_units():
    """States 1 and 3 have mean 2 and deviation 1; rewards 1 and 7, here times 10^30, have root mean
    square 5. What the buffer has room for, but was not added, counts for nothing."""
    buffer = ddpg.ReplayBuffer(9, 1, 1)
    buffer.add(1, 0.25, 1e30, 2, 0)
    buffer.add(3, 0.5, 7e30, 5, 1)
    buffer.measure()
    columns = buffer.sample(np.random.default_rng(0), 1, 50)
    drawn = np.unique(np.concatenate(columns, axis=2)[0], axis=0)
    assert_allclose(drawn, [[-1, 0.25, 0.2, 0, 0], [1, 0.5, 1.4, 3, 1]], rtol=1e-6)


@parametrize("states, std", [
    ([999e-6, 1001e-6], 1e-6),
    ([0], 1),
    ([1e6, 1e6 + 0.0625], 1),  # neighbours in float32
])
def test_a_state_that_never_moved_has_deviation_1(states, std):
    """And rewards that are all 0 have size 1."""
    buffer = ddpg.ReplayBuffer(2000, 1, 1)
    for s in states * 1000:
        buffer.add(s, 0, 0, 0, 0)
    buffer.measure()
    assert buffer.std == approx(std, rel=1e-3)
    assert buffer.reward_rms == 1


@parametrize("kind", [np.float32, np.float64])
def test_rounding_takes_no_action_out_of_its_bounds_however_far_apart(kind):
    bounds = np.random.default_rng(0).normal(size=(2, 1000)).astype(kind)
    bounds[:, 0] = np.finfo(kind).max * np.array([-1, 1])
    space = Box(*np.sort(bounds, axis=0), dtype=kind)
    for a in (-1, -0.3, 0, 1):
        assert space.contains(ddpg.rescale(np.full(1000, a), space))


def test_settings_are_fixed_once_made():
    with raises(AttributeError):
        ddpg.make_settings().gamma = 0.5


# Part 2. DDPG in a world.
class Line(gym.Env):
    """x' = 0.8 x + 0.5 a, reward -(x^2 + 0.1 a^2), x0 in [-1, 1]. An episode has `length` steps."""

    observation_space = Box(-np.inf, np.inf, (1,))
    length = 20
    terminates = False  # it is truncated

    def __init__(self, low=(-1.2,), high=(1.2,), **changes):
        self.action_space = Box(np.float32(low), np.float32(high))
        self.x = np.zeros(1, np.float32)
        self.actions = []  # of all episodes
        vars(self).update(changes)

    def see(self):
        return self.x  # the same array every time, as fast environments do

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x[:] = self.np_random.uniform(-1, 1)
        self.steps = 0
        return self.see(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.actions.append(action)
        self.steps += 1
        reward = -float(self.x[0] ** 2 + 0.1 * action[0] ** 2)
        self.x[:] = 0.8 * self.x + 0.5 * action[0]
        over = self.steps == self.length
        return self.see(), reward, over and self.terminates, over and not self.terminates, {}


def without_additions():
    """ddpg.py without the lines that end in `# +` and a word: the paper's algorithm."""
    program = (HERE / "ddpg.py").read_text(encoding="utf-8")
    return re.sub(r".*# \+ \w.*\n", "", program)


@fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain_ddpg.py").write_text(without_additions(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module("plain_ddpg")


@fixture(params=["with additions", "plain"])
def either(request, plain, compiled):
    """The program with and without what it adds to the paper."""
    return plain if request.param == "plain" else ddpg


def test_without_additions_the_critic_loss_is_that_of_the_paper(plain):
    """The number of the first test, also after an episode has terminated."""
    agent = by_hand(plain, critic_lr=0.0, tau=1.0)
    agent.gradient_step(*BATCH)
    assert float(agent.critic_loss(*BATCH)) == approx(5.5)


def test_it_finds_the_linear_quadratic_optimum(either):
    """Riccati: no policy beats -P_5 x0^2, with P_0 = 0 and
    P_k+1 = 1 + 0.64 P_k - (0.4 P_k)^2 / (0.1 + 0.25 P_k)."""
    p = 0.0
    for _ in range(5):
        p = 1 + 0.64 * p - (0.4 * p) ** 2 / (0.1 + 0.25 * p)
    env = Line(length=5)
    agent = either.Agent(env, either.make_settings(steps=2000, warmup=200))
    list(either.train(agent, env))
    returns = np.array(list(either.evaluate(agent, env)))
    starts = [env.reset(seed=n)[0].item() for n in ddpg.EVALUATION_SEEDS]
    optimum = -p * np.square(starts)
    assert np.all(returns <= optimum + 1e-4)
    assert sum(returns) > 1.03 * sum(optimum)


def test_a_pendulum_stands_up_within_30_episodes(either):
    """A policy that needs one swing more from each start gives -200 or less."""
    env = gym.make("Pendulum-v1")
    agent = either.Agent(env, either.make_settings(steps=6000, seed=100))
    list(either.train(agent, env))
    assert np.mean(list(either.evaluate(agent, env))) > -170


def trained(env, **changes):
    agent = small(env, **changes)
    list(ddpg.train(agent, env))
    return agent


def remembered(agent):
    """The rows s, a, r, s', d of the steps so far."""
    return agent.buffer.rows[:agent.buffer.steps]


@fixture
def still(monkeypatch):
    """The networks stay as they are."""
    monkeypatch.setattr(ddpg.Agent, "learn", lambda agent, batches: None)


@parametrize("terminates", [True, False])
def test_the_loop_stores_terminated_but_not_truncated(terminates, still):
    """Only what terminates loses its future: r + gamma Q' is kept for what was merely cut off."""
    rows = remembered(trained(Line(length=3, terminates=terminates), steps=6))
    assert rows["d"].ravel().tolist() == [0, 0, terminates] * 2


def test_the_loop_stores_what_happened_though_the_world_reuses_its_array(still):
    rows = remembered(trained(Line(length=3), steps=6))
    s = rows["s"]
    a = 1.2 * rows["a"]  # in the bounds of Line
    assert_allclose(rows["s_next"], 0.8 * s + 0.5 * a, atol=1e-6)
    assert_allclose(rows["r"], -(s**2 + 0.1 * a**2), atol=1e-6)
    follows = (rows["s_next"][:-1] == s[1:]).ravel().tolist()
    assert follows == [True, True, False, True, True]  # two episodes


def test_the_loop_acts_at_random_then_by_the_online_actor():
    """200 uniform numbers in [-1, 1] have deviation 1 / sqrt(3) = 0.58. Without noise, those of the
    200 steps that follow the only block of learning are mu(s)."""
    agent = trained(Line(length=200), noise=0, hidden=[5, 4], warmup=200, block=201, steps=400)
    rows = remembered(agent)
    assert rows["a"][:200].std() == approx(0.58, abs=0.06)
    expected = agent.actor(agent.buffer.standardize(rows["s"][200:]))
    assert_allclose(rows["a"][200:], expected, atol=1e-5)


def noise_of(length, steps):
    """Eight numbers for each step, by an actor that says 0, so that a = n."""
    env = Line(low=[-1] * 8, high=[1] * 8, length=length)
    agent = small(env, noise=0.1, noise_theta=0.15, steps=steps)
    agent.actor.set_weights([0 * weight for weight in agent.actor.get_weights()])
    list(ddpg.train(agent, env))
    return remembered(agent)["a"][agent.settings.warmup:]


def test_noise_has_the_deviation_and_memory_of_theory(still):
    """n is autoregressive: correlation rho = 1 - 0.15, deviation 0.1 / sqrt(1 - rho^2) = 0.19."""
    n = noise_of(length=5000, steps=5000)
    assert n.std() == approx(0.19, rel=0.05)
    assert np.corrcoef(n[1:].ravel(), n[:-1].ravel())[0, 1] == approx(0.85, abs=0.02)
    assert abs(np.corrcoef(n.T) - np.eye(8)).max() < 0.2, "dimensions share their noise"


def test_noise_starts_from_0_in_each_episode_and_differs_between_them(still):
    n = noise_of(length=1, steps=1000)
    assert n.std() == approx(0.1, rel=0.05)
    assert len(np.unique(n)) > 0.99 * n.size


def test_actions_fill_asymmetric_bounds_and_never_leave_them(still):
    """From -1 to 0.1, and from 3 to 7. Line asserts that none is outside."""
    env = Line(low=(-1, 3), high=(0.1, 7), length=50)
    a = remembered(trained(env, noise=2.0, warmup=100, steps=200))["a"]
    assert_allclose(env.actions, [-0.45, 5] + [0.55, 2] * a, atol=1e-5)
    assert a.min(axis=0).tolist() == [-1, -1]
    assert a.max(axis=0).tolist() == [1, 1]
    assert abs(np.corrcoef(a[:100].T)[0, 1]) < 0.5, "random dimensions move as one"


@parametrize("warmup, block, expected", [
    (8, 4, [8, 12, 16, 20]), (17, 1, [17, 18, 19, 20]), (6, 20, [6])])
def test_a_block_is_one_call_to_tensorflow(warmup, block, expected, monkeypatch):
    """After how many of the 20 steps? It has as many batches as the block has steps."""
    calls = []
    def learn(agent, batches):
        calls.append(agent.buffer.steps)
        assert [column.shape for column in batches] == [(block, 4, 1)] * 5
    env = Line(length=10)
    agent = small(env, warmup=warmup, block=block, steps=20)
    monkeypatch.setattr(ddpg.Agent, "learn", learn)
    monkeypatch.setattr(keras.Model, "__call__", None)  # not even to act
    list(ddpg.train(agent, env))
    assert calls == expected


def test_another_seed_gives_another_run(still):
    """The first weights, and the starts and first actions of ten episodes."""
    runs = [trained(Line(length=2), seed=seed, steps=20, warmup=19) for seed in (5, 6)]
    rows = np.concatenate([remembered(run)[::2] for run in runs])
    assert len(np.unique(rows["s"])) == len(np.unique(rows["a"])) == 20
    first, second = [flat(run.actor) for run in runs]
    assert first != approx(second, abs=0.1)


def test_history_has_steps_return_and_discounted_return():
    """Not in standard units: sum r_t, and sum 0.5^t r_t."""
    agent = trained(Line(length=3), gamma=0.5, steps=30)
    rewards = remembered(agent)["r"].reshape(10, 3)
    history = np.array(agent.history, float)
    assert history[:, 0].tolist() == [*range(3, 31, 3)]
    assert_allclose(history[:, 1], rewards @ [1, 1, 1], rtol=1e-6)
    assert_allclose(history[:, 2], rewards @ [1, 0.5, 0.25], rtol=1e-6)


def test_history_has_the_value_that_the_critic_gave_to_the_start():
    """None before anything was learned, here in the only block, at step 10. Q(s0, mu(s0)) by
    Keras, in the units of the reward."""
    agent = trained(Line(length=5), warmup=10, block=100, steps=20)
    starts = agent.buffer.standardize(remembered(agent)["s"][10::5])
    values = ddpg.q(agent.critic, starts, agent.actor(starts)).numpy().ravel()
    expected = [None, None, *(agent.buffer.reward_rms * values)]
    assert [row[3] for row in agent.history] == approx(expected)


class Scaled(Line):
    """A Line in other units: states times `scale` plus `shift`, rewards times `price`."""

    scale = 1
    shift = 0
    price = 1

    def see(self):
        return self.scale * self.x + self.shift

    def step(self, action):
        state, reward, *rest = super().step(action)
        return state, self.price * reward, *rest


@parametrize("scale, price", [(4, 1 / 64), (1 / 64, 4)])
def test_an_environment_in_other_units_gives_the_same_digits(scale, price):
    """A power of two is exact in floating point, for states and for rewards."""
    usual = trained(Scaled(), warmup=8, steps=60)
    other = trained(Scaled(scale=scale, price=price), warmup=8, steps=60)
    assert np.array_equal(remembered(other)["s"], scale * remembered(usual)["s"])
    assert same(numbers(usual), numbers(other))


def test_states_are_measured_at_each_block_to_10000_steps_after_the_warmup(still):
    """In blocks of 2500 to the steps 100, 2600, 5100, 7600 and 10100; each number of two apart."""
    env = Scaled(shift=np.array([0, 1000]), observation_space=Box(-1, 1, (2,)))
    agent = trained(env, warmup=100, block=2500, steps=13_000)
    states = remembered(agent)["s"][:10_100].astype(float)
    assert_allclose(agent.buffer.mean, states.mean(axis=0), rtol=1e-9)
    assert_allclose(agent.buffer.std, states.std(axis=0), rtol=1e-9)


class Fails(Line):
    """A Line that from step `at` of its life raises `error`, or says another state or reward."""

    at = 1
    error = None
    wrong = {}

    def step(self, action):
        state, reward, *ends, info = super().step(action)
        if len(self.actions) >= self.at:
            if self.error:
                raise self.error
            state = self.wrong.get("state", state)
            reward = self.wrong.get("reward", reward)
        return state, reward, *ends, info


@parametrize("wrong", [
    {"state": [np.nan]}, {"state": [0, 0]}, {"state": [[0], [0, 0]]},
    {"reward": None}, {"reward": -np.inf}, {"reward": 1e39}, {"reward": [1, 2]}], ids=str)
def test_what_is_no_finite_number_never_reaches_the_memory(wrong):
    agent = small(Line(), warmup=50)
    with raises(ddpg.DDPGError, match="finite"):
        list(ddpg.train(agent, Fails(at=7, wrong=wrong)))
    assert agent.buffer.steps == 6
    assert not agent.buffer.rows["s"][6:].any()


def test_an_action_that_is_not_finite_never_reaches_the_environment(still):
    env = Line()
    agent = small(env, hidden=[], warmup=7)
    become(agent.actor, np.nan)
    with raises(FloatingPointError):
        list(ddpg.train(agent, env))
    assert len(env.actions) == 7


def test_states_rewards_and_ends_may_have_odd_types(still):
    class Odd(Line):
        def step(self, action):
            state, *others, info = super().step(action)
            return state.tolist(), *[np.array([value]) for value in others], info
    agent = trained(Odd(length=3, terminates=True), steps=6)
    rows = remembered(agent)
    assert rows["d"].ravel().tolist() == [0, 0, 1, 0, 0, 1]
    assert agent.history[0][1] == approx(rows["r"][:3].sum())


@parametrize("limit, expected", [(None, 1000), (7, 7), (1500, 1500)])
def test_an_episode_of_3000_steps_is_truncated(limit, expected, still):
    """By its time limit, or else after 1,000 steps; in training, and when it is evaluated."""
    line = Line(length=3000)
    env = gym.wrappers.TimeLimit(line, limit) if limit else line
    agent = trained(env, steps=5)
    assert agent.history[0][0] == expected
    assert not remembered(agent)["d"].any()
    next(ddpg.evaluate(agent, env))
    assert len(line.actions) == 2 * expected


def test_a_policy_is_a_copy_though_training_goes_on():
    env = Line()
    agent = small(env)
    run = ddpg.train(agent, env)
    next(run)
    s = np.ones((1, 1))
    kept = ddpg.policy(agent)
    before = kept(s)[0, 0]
    next(run)
    assert kept(s)[0, 0] == before
    assert ddpg.policy(agent)(s)[0, 0] != before


# Part 3. The program. Test-v0 is the environment that was registered last.
SHORT = """--env Test-v0 --steps 50 --warmup 20 --block 4 --hidden 4 --batch-size 4
    --buffer-size 1000""".split()


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
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def digits(folder):
    """All that is saved of a run, by name."""
    with np.load(folder / "checkpoint.npz") as file:
        return dict(file)


@fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three episodes that nothing stopped."""
    register()
    folder = tmp_path_factory.mktemp("whole") / "a" / "b"
    ddpg_py(*SHORT, "--out", folder)
    return folder


@fixture
def copy(whole, tmp_path):
    """A folder with the checkpoint of that run."""
    register()
    (tmp_path / "checkpoint.npz").write_bytes((whole / "checkpoint.npz").read_bytes())
    return tmp_path


def test_a_run_leaves_four_files_and_a_row_for_each_episode(whole):
    assert set(contents(whole)) == {"returns.csv", "returns.png", "actor.keras", "checkpoint.npz"}
    first, second, third = ddpg.read(whole / "checkpoint.npz")["history"]
    rows = [[1, *first[:3], ""], [2, *second], [3, *third]]
    header, *lines = (whole / "returns.csv").read_text().splitlines()
    assert header == "episode,steps,return,discounted,value"
    assert lines == [",".join(map(str, row)) for row in rows]


def test_a_run_prints_a_row_each_second(tmp_path, monkeypatch, capfd, still):
    """By a clock of ten steps a second: an episode of five steps takes half a second."""
    env = Line(length=5)
    monkeypatch.setattr(ddpg.time, "perf_counter", lambda: len(env.actions) / 10)
    agent = small(env, warmup=25, steps=78)
    ddpg.run(agent, env, tmp_path)
    first, header, *rows, _ = capfd.readouterr().out.splitlines()
    assert "compiles" in first
    assert {len(row) for row in rows} == {len(header)}
    assert [row.split()[0] for row in rows] == "1 3 5 7 9 11 13 15 16".split()
    mean = np.mean([row[1] for row in agent.history[1:11]])
    step, total, discounted, value = agent.history[10]
    printed = [float(word) for word in rows[5].split()[:-1]]
    assert printed == approx([11, step, total, mean, discounted, value, 10, 2], rel=1e-3)


def test_a_run_prints_the_mean_return_of_actor_keras(tmp_path, capfd):
    """In ten episodes, played here on raw states in the units of the environment."""
    env = Scaled(low=(-1,), high=(2,), scale=5, shift=100)
    ddpg.run(small(env), env, tmp_path)
    actor = keras.models.load_model(tmp_path / "actor.keras")
    rewards = []
    for seed in ddpg.EVALUATION_SEEDS:
        s, _ = env.reset(seed=seed)
        for _ in range(env.length):
            s, r, *_ = env.step(np.clip(actor(s[None])[0], -1, 2))
            rewards.append(r)
    printed = re.search(r"without noise: (.*?);", capfd.readouterr().out)[1]
    assert float(printed) == approx(sum(rewards) / 10, rel=1e-3)


@parametrize("seconds, expected", [
    (0, [0, *range(10, 201, 10), 200]), (3, [0, 10, 68, 126, 184, 200])])
def test_files_are_renewed_every_10_seconds_or_20_savings(
        seconds, expected, tmp_path, monkeypatch, still):
    """By a clock of one step a second, where saving takes `seconds`. Episodes have two steps."""
    env = Line(length=2)
    saved = []
    renewed = []
    monkeypatch.setattr(ddpg.time, "perf_counter", lambda: len(env.actions) + seconds * len(saved))
    monkeypatch.setattr(ddpg, "save", lambda agent, path: saved.append(agent.buffer.steps))
    monkeypatch.setattr(ddpg, "write_results", lambda agent, out: renewed.append(saved[-1]))
    ddpg.run(small(env, steps=200), env, tmp_path)
    assert saved == expected
    assert renewed == expected[1:]


def test_the_picture_has_two_panels():
    """Of returns 1, 2, 3 and so on, the mean of the last ten is 4.5 less than the last."""
    history = [[200 * i, i, 2 * i, 3 * i] for i in range(1, 31)]
    agent = SimpleNamespace(settings=ddpg.make_settings(seed=7), history=history)
    above, below = ddpg.plot(agent).axes
    assert above.get_title() == "Pendulum-v1, seed 7"
    returns, means = [line.get_xydata().tolist() for line in above.lines]
    assert returns == [row[:2] for row in history]
    assert means == [[200 * i, i - 4.5] for i in range(10, 31)]
    discounted, value = [line.get_xydata().tolist() for line in below.lines]
    assert discounted == [row[::2] for row in history]
    assert value == [row[::3] for row in history]


def test_the_picture_is_shown_after_all_is_written_and_ctrl_c_closes_it(copy, monkeypatch, capfd):
    seen = []
    def show():
        seen.append(len(contents(copy)))
        raise KeyboardInterrupt
    monkeypatch.setattr(ddpg.plt, "get_backend", lambda: "a window, let us say")
    monkeypatch.setattr(ddpg.plt, "show", show)
    assert ddpg_py("--resume", "--out", copy) == 0
    assert seen == [4]
    assert "--resume" not in capfd.readouterr().out


def test_a_run_has_a_folder_that_its_env_and_seed_find_again(tmp_path, monkeypatch):
    register(name="ns/Test-v0")
    monkeypatch.chdir(tmp_path)
    options = ["--env", "sys:ns/Test-v0", "--seed", 7]
    assert ddpg_py(*SHORT, *options) == ddpg_py("--resume", *options) == 0
    assert len(contents(tmp_path / "runs" / "sys-ns-Test-v0-seed7")) == 4


@parametrize("out", ["here", "~/here"])
def test_out_means_what_it_meant_at_the_start(out, tmp_path, monkeypatch):
    class Wanders(Line):
        def reset(self, **arguments):
            os.chdir("/")
            return super().reset(**arguments)
    register(Wanders)
    monkeypatch.chdir(tmp_path)
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    assert ddpg_py(*SHORT, "--out", out) == 0
    assert len(contents(tmp_path / "here")) == 4


def test_without_additions_the_program_runs(plain, tmp_path):
    register()
    assert plain.main([*SHORT, "--out", str(tmp_path)]) == 0


# How a run can stop.
@parametrize("at, failure, status, line", [
    (3, {"error": KeyboardInterrupt}, 130, "--resume --out"),
    (47, {"error": KeyboardInterrupt}, 130, "--resume --out"),
    (250, {"error": KeyboardInterrupt}, 130, "--resume --out"),  # while it evaluates
    (47, {"wrong": {"state": [0, 0]}}, 1, "ddpg.py: episode 3: state [0, 0], shape (2,)"),
])
def test_whatever_stops_a_run_costs_no_digit(at, failure, status, line, whole, tmp_path, capfd):
    register(Fails, at=at, **failure)
    assert ddpg_py(*SHORT, "--out", tmp_path) == status
    assert line in "".join(capfd.readouterr()).splitlines()[-1]
    assert len(contents(tmp_path)) == 4
    register()
    assert ddpg_py("--resume", "--out", tmp_path) == 0
    assert same(digits(tmp_path), digits(whole))


def test_ctrl_c_before_there_is_a_checkpoint_gives_no_advice(tmp_path, capfd):
    def interrupted():
        raise KeyboardInterrupt
    register(interrupted)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 130
    assert capfd.readouterr().out == "\ninterrupted\n"


@parametrize("wrong, largest", [
    ({"reward": 1e30}, "reward, 1e+30"), ({"state": [1e30]}, "state remembered, 1e+30")])
def test_training_that_diverges_names_the_largest_numbers(
        wrong, largest, tmp_path, monkeypatch, capfd):
    """They come after step 10,000, let us say: the units stay."""
    monkeypatch.setattr(ddpg.ReplayBuffer, "measure", lambda buffer: None)
    register(Fails, at=30, wrong=wrong)
    assert ddpg_py(*SHORT, "--out", tmp_path) == 1
    assert largest in capfd.readouterr().err


def test_a_weight_that_is_not_finite_is_not_saved(copy):
    before = contents(copy)
    agent = by_hand()
    become(agent.critic, 1, np.nan)
    with raises(FloatingPointError):
        ddpg.save(agent, copy / "checkpoint.npz")
    assert contents(copy) == before


def test_a_disk_that_is_full_leaves_the_last_checkpoint(copy, monkeypatch):
    def half(path, **arrays):
        Path(path).write_bytes(b"half")
        raise OSError("no space")
    before = digits(copy)
    monkeypatch.setattr(np, "savez", half)
    with raises(ddpg.DDPGError, match="no space"):
        ddpg.save(by_hand(), copy / "checkpoint.npz")
    assert same(digits(copy), before)


@fixture
def undrawable(monkeypatch):
    def plot(agent):
        raise ValueError("no such font")
    monkeypatch.setattr(ddpg, "plot", plot)


def test_a_picture_that_cannot_be_drawn_is_told_in_the_last_line(tmp_path, capfd, undrawable):
    register()
    assert ddpg_py(*SHORT, "--out", tmp_path) == 1
    out, err = capfd.readouterr()
    assert "without noise" in out
    assert "no such font" in err
    assert err.count("\n") == 1
    assert set(contents(tmp_path)) == {"returns.csv", "actor.keras", "checkpoint.npz"}


def test_an_error_of_the_environment_keeps_its_traceback(tmp_path, undrawable):
    """Whatever else is wrong."""
    register(Fails, error=RuntimeError("unplugged"))
    with raises(RuntimeError, match="unplugged"):
        ddpg_py(*SHORT, "--out", tmp_path)


def test_a_run_that_is_loaded_and_saved_is_the_same(whole, tmp_path):
    """A path may be text."""
    agent = ddpg.load(Line(), str(whole / "checkpoint.npz"))
    assert flat(ddpg.policy(agent)) == flat(keras.models.load_model(whole / "actor.keras"))
    ddpg.save(agent, str(tmp_path / "checkpoint.npz"))
    assert same(digits(tmp_path), digits(whole))


def test_settings_of_numpy_types_are_saved(tmp_path):
    settings = ddpg.make_settings(gamma=np.float32(0.5), hidden=np.array([4]))
    ddpg.save(ddpg.Agent(Line(), settings), tmp_path / "checkpoint.npz")
    assert ddpg.read(tmp_path / "checkpoint.npz")["settings"] == settings


def test_more_steps_are_a_longer_run(tmp_path):
    """The ring of 30 has wrapped, and episodes have terminated."""
    register(length=7, terminates=True)
    options = [*SHORT, "--buffer-size", 30, "--noise-theta", 0.15]
    ddpg_py(*options, "--steps", 120, "--out", tmp_path / "once")
    ddpg_py(*options, "--steps", 60, "--out", tmp_path / "twice")
    ddpg_py("--resume", "--steps", 120, "--out", tmp_path / "twice")
    assert same(digits(tmp_path / "once"), digits(tmp_path / "twice"))


def test_a_run_goes_on_with_changed_settings(whole):
    """Here a learning rate of 0: the actor rests."""
    env = Line()
    agent = ddpg.load(env, whole / "checkpoint.npz", steps=80, actor_lr=0)
    list(ddpg.train(agent, env))
    before = digits(whole)
    after = numbers(agent)
    assert agent.buffer.steps == 80
    assert np.array_equal(after["actor_0"], before["actor_0"])
    assert not np.array_equal(after["critic_0"], before["critic_0"])


# What is refused.
@fixture
def refusal(tmp_path, capfd):
    """The line with which these options are refused; empty if they are not, or if it wrote."""
    def refusal(*options):
        before = contents(tmp_path)
        status = ddpg_py(*options)
        out, err = capfd.readouterr()
        silent = out == "" and contents(tmp_path) == before
        return err * (status == 2 and silent and err.count("\n") == 1)
    return refusal


@parametrize("option", """
    --steps=0 --steps=-3 --steps=many --seed=-1 --seed=2147483648 --hidden=0 --hidden=8.5
    --gamma=1.01 --gamma=-0.1 --gamma=nan --tau=1.01 --tau=-0.1 --noise=-0.1 --noise=inf
    --noise-theta=1.01 --actor-lr=-0.001 --critic-lr=inf --batch-size=0 --buffer-size=0 --warmup=0
    --warmup=20000 --block=0 --step=3000 --frobnicate=3 --env=Nowhere-v0 --env=nowhere:Nowhere-v0
    --env=sys:Nowhere-v0 --env=Missing-v0 --env=Object-v0""".split())
def test_bad_input_is_refused(option, tmp_path, refusal):
    register("nowhere:Env", name="Missing-v0")
    register(object, name="Object-v0")
    line = refusal("--steps=20000", option, "--out", tmp_path / "out")
    name, value = option.split("=")
    assert value in line
    assert name[2:5] in line


@parametrize("changes, named", [
    ({"observation_space": Box(0, 255, (4, 4))}, "(4, 4)"),
    ({"observation_space": Box(-1, 1, (3,))}, "shape (1,): must be finite, shape (3,)"),
    ({"action_space": Discrete(3)}, "Discrete(3)"),
    ({"action_space": Box(-2, 2, (1,), np.int64)}, "int64"),
    ({"action_space": Box(-np.inf, 1, (1,))}, "inf"),
], ids=str)
def test_unfit_spaces_are_refused(changes, named, tmp_path, refusal):
    register(**changes)
    assert named in refusal(*SHORT, "--out", tmp_path / "out")


def test_an_unknown_setting_is_refused():
    with raises(ddpg.DDPGError, match="colour"):
        ddpg.make_settings(colour="red")


@parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_used_is_refused(out, tmp_path, refusal):
    register()
    (tmp_path / "file").write_text("mine")
    assert "file" in refusal(*SHORT, "--out", tmp_path / out)


@parametrize("name", ["returns.csv", "returns.png", "actor.keras"])
def test_results_without_a_checkpoint_are_not_overwritten(name, tmp_path, refusal):
    register()
    (tmp_path / name).write_text("mine")
    assert name in refusal(*SHORT, "--out", tmp_path)


def test_a_run_is_not_overwritten(copy, refusal):
    assert "add --resume" in refusal(*SHORT, "--out", copy)


@parametrize("option", ["--resume", "--gif"])
@parametrize("other", ["--env=Pendulum-v1", "--seed=1", "--hidden=5", "--buffer-size=999"])
def test_what_belongs_to_a_run_cannot_be_changed(option, other, copy, refusal):
    assert "omit it" in refusal(option, other, "--out", copy)


@parametrize("option", ["--resume", "--gif"])
@parametrize("changes", [
    {"low": (-1,)}, {"shift": np.zeros(2), "observation_space": Box(-1, 1, (2,))}], ids=str)
def test_a_run_needs_the_environment_it_had(option, changes, copy, refusal):
    register(Scaled, **changes)
    assert "states, actions or bounds" in refusal(option, "--out", copy)


@parametrize("option", ["--resume", "--gif", "--seed=0"])
@parametrize("arrays, end", [
    ({"settings": '{"colour": "red"}'}, None),
    ({"settings": "{}", "history": "[[1, 2, 3, 4]]"}, None),
    ({}, 0),
    ({"settings": "{}"}, -100),
], ids=str)
def test_a_checkpoint_that_is_damaged_or_foreign_is_refused(option, arrays, end, tmp_path, refusal):
    path = tmp_path / "checkpoint.npz"
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:end])
    assert "--out" in refusal(option, "--out", tmp_path)


@parametrize("option", ["--resume", "--gif"])
def test_what_is_not_there_cannot_go_on(option, tmp_path, refusal):
    assert "checkpoint.npz" in refusal(option, "--out", tmp_path)


class Drawn(Line):
    """A Line to look at: frames that grow lighter, or an error."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    error = None

    def render(self):
        if self.error:
            raise self.error
        return np.full((8, 8, 3), len(self.actions) % 256, np.uint8)


def test_a_gif_shows_one_episode(copy, capfd):
    """Of 1,000 steps, as nothing ends it before."""
    register(Drawn, length=3000)
    agent = ddpg.load(Line(), copy / "checkpoint.npz")
    assert ddpg_py("--gif", "--out", copy) == 0
    with Image.open(copy / "policy.gif") as picture:
        assert picture.n_frames == 1001
        assert picture.info["duration"] == 40
    expected = next(ddpg.evaluate(agent, Line(length=3000)))
    assert f"return {expected:.5g}" in capfd.readouterr().out


@parametrize("environment, changes", [
    (Line, {}),
    (Drawn, {"error": NotImplementedError}),
    (Drawn, {"error": gym.error.DependencyNotInstalled("pip install it")})])
def test_what_cannot_be_drawn_is_refused(environment, changes, copy, refusal):
    register(environment, **changes)
    assert "cannot draw" in refusal("--gif", "--out", copy)


def test_an_error_while_drawing_keeps_its_traceback(copy):
    register(Drawn, error=RuntimeError("no pen"))
    with raises(RuntimeError, match="no pen"):
        ddpg_py("--gif", "--out", copy)


@parametrize("environment, changes, options", [
    (Line, {}, ["--resume"]),
    (Line, {}, [*SHORT, "--out", "new"]),
    (Line, {"action_space": Discrete(3)}, ["--resume"]),
    (Fails, {"error": KeyboardInterrupt}, ["--resume"]),
    (Drawn, {}, ["--gif"]),
    (Drawn, {"error": RuntimeError}, ["--gif"]),
])
def test_the_environment_is_closed_on_every_way_out(
        environment, changes, options, copy, monkeypatch):
    built = []
    closed = []
    class Door(environment):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            built.append(self)
        def close(self):
            closed.append(self)
    register(Door, **changes)
    monkeypatch.chdir(copy)
    with contextlib.suppress(RuntimeError):
        ddpg_py("--out", copy, *options)
    assert built
    assert set(closed) == set(built)


# The program of its own: python ddpg.py.
LONG = "--hidden 8 --batch-size 16 --warmup 100 --steps 2000".split()
PROGRAM = """
import itertools, os, signal, sys, ddpg
_, killed_at, *options = sys.argv
steps = itertools.count(1)
rescale = ddpg.rescale
def counted(a, space):
    if next(steps) == int(killed_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return rescale(a, space)
ddpg.rescale = counted
ddpg.SAVE_EVERY = 0
sys.exit(ddpg.main(options))
"""


def start(out, *options, killed_at=0, preexec_fn=None):
    """`python ddpg.py --out out` with these options, killed at a step."""
    settings = {"PYTHONPATH": str(HERE), "MPLBACKEND": "agg", "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", PROGRAM, killed_at, "--out", out, *options]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE,
                            preexec_fn=preexec_fn, env=os.environ | settings)


@pytest.mark.skipif(os.name == "nt", reason="needs signals and limits of POSIX")
def test_digits_survive_a_kill_and_a_full_disk(tmp_path):
    """Two runs side by side. One is left alone. One is killed, then has room for little more, then
    goes on."""
    import resource
    alone = start(tmp_path / "alone", *LONG)
    folder = tmp_path / "stopped"
    assert start(folder, *LONG, killed_at=650).wait() < 0
    room = 20_000 + (folder / "checkpoint.npz").stat().st_size
    full = start(folder, "--resume", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (room, room)))
    assert b"cannot write" in full.communicate()[1]
    assert full.returncode == 1
    assert start(folder, "--resume").wait() == 0
    assert alone.wait() == 0
    assert same(digits(folder), digits(tmp_path / "alone"))


def test_the_readme_and_the_program_agree(capsys):
    """Of sections, excerpts, additions, tests, flags and files; and its mathematics is where
    Markdown does not change it."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    program = (HERE / "ddpg.py").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\d+)\.(.*?)(?=^##? [A-Z\d])", readme, re.M | re.S))
    assert set(re.findall(r"(?:section|^   ) (\d+)", ddpg.__doc__, re.M)) <= set(sections)
    for number, text in sections.items():
        for code in re.findall(r"```python\n(.*?)```", text, re.S):
            assert code in (program if number == "9" else without_additions())
    table = re.search(r"^\|[- |:]+\|\n((?:\|.*\n)+)", sections["9"], re.M)[1]
    additions = set(re.findall(r"^\|\W*(\w+)", table, re.M))
    assert additions == set(re.findall(r"# \+ (\w+)", program))
    assert set(re.findall(r"`(test_\w+)`", readme)) <= set(globals())
    ddpg_py("--help")
    flags = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
    assert {name.replace("_", "-") for name in ddpg.OPTIONS} <= flags
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", readme)) <= flags
    for link in re.findall(r"""(?:\]\(|src=")([^):"#]+)[)"]""", readme):
        assert (HERE / link).exists()
    prose = re.sub(r"^```.*?^```|\$`[^`]*`\$|`[^`]*`", "", readme, flags=re.M | re.S)
    assert re.findall(r".{0,30}\$.{0,30}", prose) == []
