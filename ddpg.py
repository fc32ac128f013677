"""Deep Deterministic Policy Gradient (DDPG) in one file, to be read beside README.md.

An actor mu maps a state s to an action a; a critic Q estimates the return that follows (s, a);
slow copies of both, the targets mu' and Q', keep the critic from chasing its own estimates. This is
Algorithm 1 of Lillicrap et al. 2015 (arXiv:1509.02971), in the order of README.md's sections:

    2  the networks mu and Q                    ann
    3  memory of (s, a, r, s', d = terminated)  ReplayBuffer
    4  theta' <- tau theta' + (1 - tau) theta   soft_update
    5  critic's loss (y - Q(s, a))^2, target y  Agent.critic_loss
    6  actor's loss -Q(s, mu(s))                Agent.actor_loss
    7  a gradient step of all networks          Agent.gradient_step
    8  act with noise, remember, learn          train

Lines that end with `# +` and a word are additions to it, which section 9 explains; without them the
file is plain DDPG, and still runs. `python ddpg.py` teaches a pendulum to stand up;
`python ddpg.py --help` lists every setting.
"""

import argparse
import collections
import contextlib
import copy
import csv
import json
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow says less while it starts
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras
import tensorflow as tf

OPTIONS = {  # name: (default, meaning)
    "env": ("Pendulum-v1", "Gymnasium environment; module:Name-v0 for your own"),
    "steps": (20_000, "environment steps to train; the last episode is finished"),
    "seed": (0, "source of all randomness"),
    "hidden": ([64, 64, 64], "hidden layer sizes of both networks"),
    "actor_lr": (1e-3, "learning rate of the actor"),
    "critic_lr": (2e-3, "learning rate of the critic"),
    "gamma": (0.99, "discount per step"),
    "tau": (0.98, "share of itself that a target keeps; the paper's tau is 1 - this"),
    "noise": (0.2, "sigma of the exploration noise, where actions lie in [-1, 1]"),
    "noise_theta": (1.0, "share of the noise forgotten per step; the paper's is 0.15"),
    "batch_size": (128, "transitions in a batch, N"),
    "buffer_size": (100_000, "transitions remembered"),
    "warmup": (1000, "environment steps before learning, with random actions"),
    "block": (50, "environment steps, then as many gradient steps; the paper's is 1"),
}


def ann(input_size, layer_sizes, output_activation):
    """A network from (N, input_size) to (N, layer_sizes[-1]), its hidden layers relu."""
    *hidden, last = layer_sizes
    network = keras.Sequential([keras.Input((input_size,))])
    for size in hidden:
        network.add(keras.layers.Dense(size, "relu"))
    network.add(keras.layers.Dense(last))
    network.add(keras.layers.Activation(output_activation))
    return network


def rescale(a, space):
    """An action in [-1, 1]^m in the units of its space: -1 is its low, 1 its high."""
    low = space.low.astype(float)
    high = space.high.astype(float)
    middle = high / 2 + low / 2
    half = high / 2 - low / 2
    action = middle + half * a
    return np.clip(action, low, high).astype(space.dtype)  # rounding may have left the bounds


class ReplayBuffer:
    """The last `capacity` transitions s, a, r, s', d; d is 1 if the episode terminated in s', else
    0, also at a time limit. `add` keeps them as they come, `sample` gives out standard units."""

    def __init__(self, capacity, state_size, action_size):
        self.rows = np.zeros(capacity, [
            ("s", "f4", (state_size,)), ("a", "f4", (action_size,)), ("r", "f4", (1,)),
            ("s_next", "f4", (state_size,)), ("d", "f4", (1,))])
        self.steps = 0  # transitions ever added: the environment steps so far
        self.mean = np.zeros(state_size)  # with these units, `standardize` changes nothing
        self.std = np.ones(state_size)
        self.reward_rms = 1.0

    def add(self, s, a, r, s_next, d):
        self.rows[self.steps % len(self.rows)] = s, a, r, s_next, d  # in place of the oldest
        self.steps += 1

    def measure(self):  # + units
        """Mean and deviation of the states, root mean square of the rewards."""  # + units
        filled = self.rows[:self.steps]  # + units
        s = filled["s"].astype(float)  # + units
        r = filled["r"].astype(float)  # + units
        self.mean = s.mean(axis=0)  # + units
        self.std = s.std(axis=0)  # + units
        self.std[self.std <= 1e-7 * abs(self.mean)] = 1  # + units: a number that never changes
        self.reward_rms = float((r**2).mean() ** 0.5) or 1.0  # + units

    def standardize(self, s):
        return ((s - self.mean) / self.std).astype(np.float32)

    def sample(self, rng, batches, batch_size):
        """Random batches s, a, r, s', d, each of shape (batches, batch_size, its width)."""
        filled = self.rows[:self.steps]
        rows = filled.take(rng.integers(len(filled), size=(batches, batch_size)))
        return (self.standardize(rows["s"]), rows["a"], rows["r"] / self.reward_rms,
                self.standardize(rows["s_next"]), rows["d"])


def q(critic, s, a):
    """Q(s, a), of shape (N, 1): state and action enter the critic together."""
    return critic(tf.concat([s, a], axis=1))


def soft_update(target, network, tau):
    """theta' <- tau theta' + (1 - tau) theta. With tau near 1 the target follows slowly."""
    for slow, fast in zip(target.variables, network.variables):
        slow.assign(tau * slow + (1 - tau) * fast)


class Agent:
    """Networks, optimizers, memory, and `history`, a row for each episode: the steps so far, the
    return, the discounted return, and what the critic expected of it at the start. Networks and
    losses take states and rewards in standard units, and actions in [-1, 1]^m."""

    def __init__(self, env, settings):
        keras.utils.set_random_seed(settings.seed)  # for the first weights
        state_size = env.observation_space.shape[0]
        action_size = env.action_space.shape[0]
        self.settings = settings
        self.action_space = env.action_space
        self.buffer = ReplayBuffer(settings.buffer_size, state_size, action_size)
        self.history = []

        self.actor = ann(state_size, [*settings.hidden, action_size], "tanh")
        self.critic = ann(state_size + action_size, [*settings.hidden, 1], "linear")
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic = copy.deepcopy(self.critic)
        self.final_actor = self.actor  # evaluated and saved: the actor itself
        self.final_actor = copy.deepcopy(self.actor)  # + average: rather of its recent selves
        self.ended = tf.Variable(0.0)  # + doubt: 1 as soon as an episode has terminated
        self.before_tanh = keras.Sequential(self.actor.layers[:-1])  # + penalty: same weights

        self.actor_optimizer = keras.optimizers.Adam(settings.actor_lr)
        self.critic_optimizer = keras.optimizers.Adam(settings.critic_lr)
        self.actor_optimizer.build(self.actor.trainable_variables)  # not possible in a tf.function
        self.critic_optimizer.build(self.critic.trainable_variables)

    def critic_loss(self, s, a, r, s_next, d):
        """1/N sum (y - Q(s, a))^2 with y = r + gamma (1 - d) Q'(s', mu'(s')).
        Shapes: s, s_next (N, state_size); a (N, action_size); r, d (N, 1), never (N,)."""
        a_next = self.target_actor(s_next)
        q_next = q(self.target_critic, s_next, a_next)
        gap = q(self.critic, s_next, a_next) - q_next  # + doubt: two opinions on one state
        q_next -= self.ended * tf.where(gap > 0, gap / 4, -gap)  # + doubt
        y = tf.stop_gradient(r + self.settings.gamma * (1 - d) * q_next)
        return tf.reduce_mean((y - q(self.critic, s, a)) ** 2)

    def actor_loss(self, s):
        """-1/N sum Q(s, mu(s)). Shape: s (N, state_size)."""
        loss = -tf.reduce_mean(q(self.critic, s, self.actor(s)))
        loss += tf.reduce_mean(tf.nn.relu(abs(self.before_tanh(s)) - 5) ** 2)  # + penalty
        return loss

    def gradient_step(self, s, a, r, s_next, d):
        """Critic, actor, targets: the inner part of Algorithm 1."""
        self.ended.assign(tf.maximum(self.ended, tf.reduce_max(d)))  # + doubt
        with tf.GradientTape() as tape:
            critic_loss = self.critic_loss(s, a, r, s_next, d)
        gradients = tape.gradient(critic_loss, self.critic.trainable_variables)
        self.critic_optimizer.apply(gradients)

        with tf.GradientTape() as tape:
            actor_loss = self.actor_loss(s)
        gradients = tape.gradient(actor_loss, self.actor.trainable_variables)
        self.actor_optimizer.apply(gradients)

        soft_update(self.target_critic, self.critic, self.settings.tau)
        soft_update(self.target_actor, self.actor, self.settings.tau)
        t = tf.cast(self.actor_optimizer.iterations, tf.float32)  # + average: gradient steps so far
        soft_update(self.final_actor, self.actor, t / (t + 4))  # + average: 2/3 the last quarter

    @tf.function(jit_compile=True)  # compiled: a block of gradient steps is one call from Python
    def learn(self, columns):
        """A gradient step for each of the batches that ReplayBuffer.sample gives."""
        for i in tf.range(len(columns[0])):
            self.gradient_step(*[column[i] for column in columns])


def forward(weights, x):
    """What a network of `ann` outputs for one input, before its activation. In NumPy, since for one
    input Keras takes 100 times as long."""
    *hidden, kernel, bias = weights
    for w, b in zip(hidden[::2], hidden[1::2]):
        x = np.maximum(x @ w + b, 0)
    return x @ kernel + bias


def mu(weights, s):
    return np.tanh(forward(weights, s))


def train(agent, env):
    """Algorithm 1. Yields the return of each episode; between episodes a run can be saved."""
    env = make(env)  # below: checks what it says
    settings = agent.settings
    buffer = agent.buffer
    weights = agent.actor.get_weights()

    while buffer.steps < settings.steps:
        rng = np.random.default_rng([settings.seed, len(agent.history)])  # for resuming
        s, _ = env.reset(seed=int(rng.integers(2**31)))
        n = np.zeros(agent.action_space.shape)
        value = expected(agent, s)  # what the critic says, for the report alone
        rewards = []
        done = False

        while not done:
            if buffer.steps < settings.warmup:
                a = rng.uniform(-1, 1, n.shape)
            else:
                n = (1 - settings.noise_theta) * n + settings.noise * rng.standard_normal(n.shape)
                a = np.clip(mu(weights, buffer.standardize(s)) + n, -1, 1)

            s_next, r, terminated, truncated, _ = env.step(rescale(a, agent.action_space))
            buffer.add(s, a, r, s_next, terminated)  # a time limit is no end
            s = s_next
            rewards.append(r)
            done = terminated or truncated

            since_warmup = buffer.steps - settings.warmup
            if since_warmup >= 0 and since_warmup % settings.block == 0:
                if since_warmup <= 10_000:  # + units: later, new ones would unsettle it
                    buffer.measure()  # + units
                agent.learn(buffer.sample(rng, settings.block, settings.batch_size))
                weights = agent.actor.get_weights()

        episode_return = float(np.sum(rewards))
        discounted = float(np.dot(rewards, settings.gamma ** np.arange(len(rewards))))
        agent.history.append([buffer.steps, episode_return, discounted, value])
        yield episode_return


# That is DDPG. What follows checks the environment, evaluates, plots, saves, reads commands.
Settings = collections.namedtuple(  # fixed, as `learn` is compiled with them
    "Settings", OPTIONS, defaults=[default for default, _ in OPTIONS.values()])
OF_THE_RUN = ("env", "seed", "hidden", "buffer_size")  # settings that --resume cannot change
EVALUATION_SEEDS = range(1_000_000, 1_000_010)  # the same ten starts for every run
SAVE_EVERY = 10  # seconds between checkpoints


class DDPGError(ValueError):
    """What went wrong and what to do about it, in one line for the user."""

    status = 2  # of the program: refused before training


class Stopped(DDPGError):
    """The same, when training had begun."""

    status = 1


@contextlib.contextmanager
def explained(sentence, *errors):
    """Any of `errors` within becomes a DDPGError that begins with `sentence`."""
    try:
        yield
    except errors as error:
        raise DDPGError(f"{sentence} ({str(error) or repr(error)})") from error


def make_settings(**changes):
    """The defaults of OPTIONS with `changes`. DDPGError: unknown, of another kind, out of range.
    Whole numbers begin at 1 and a seed at 0; the others lie in [0, 1], but noise may be larger."""
    with explained(f"choose settings from {', '.join(OPTIONS)}", TypeError):
        settings = Settings(**changes)._asdict()
    for name, (default, _) in OPTIONS.items():
        kind = type(default)
        least = int(kind is not float and name != "seed")
        most = 2**31 - 1 if kind is not float else sys.float_info.max if name == "noise" else 1
        with explained(f"{name} {settings[name]}: choose {least} to {most}", TypeError, ValueError):
            value = np.array(settings[name]).tolist()  # in Python's types, not NumPy's
            for number in [] if kind is str else value if kind is list else [value]:
                if not least <= number <= most:
                    raise ValueError("it is out of range")
                if kind is not float and not isinstance(number, int):
                    raise TypeError("it is not a whole number")
            settings[name] = kind(value)
    if settings["steps"] <= settings["warmup"]:
        raise DDPGError("steps {steps}: choose more than the {warmup} of warmup".format(**settings))
    return Settings(**settings)


def finite(name, value, shape):
    """The value as a float32 array of its own. DDPGError if not finite, or of another shape."""
    try:
        with np.errstate(over="ignore"):
            array = np.array(value, np.float32)
    except (TypeError, ValueError, OverflowError):  # no numbers, or rows of different lengths
        array = np.array(np.nan)
    if array.shape != shape or not np.isfinite(array).all():
        raise DDPGError(f"{name} {value}, shape {array.shape}: must be finite, shape {shape}")
    return array


class Checked(gym.ObservationWrapper):
    """An environment that gives float32 states in arrays of their own, one finite number as reward,
    and ends as bools. DDPGError if it cannot."""

    def observation(self, state):
        return finite("state", state, self.observation_space.shape)

    def step(self, action):
        if not np.isfinite(action).all():
            raise FloatingPointError("an action is not finite")
        state, reward, terminated, truncated, info = super().step(action)
        reward = np.squeeze(reward)
        finite("reward", reward, ())
        return state, float(reward), bool(terminated), bool(truncated), info


def make(env, **options):
    """An environment for `train`, from a Gymnasium id (and options for its constructor), or from
    one that was built. It is checked, and truncated after 1,000 steps if it has no time limit.
    DDPGError if it is not supported."""
    if isinstance(env, Checked):
        return env
    if isinstance(env, str):
        with explained(f"--env {env}: choose another", gym.error.Error, ImportError, TypeError):
            env = gym.make(env, **options)
    if not isinstance(env, gym.Env):
        raise DDPGError(f"{env} is no environment: build one from a class that is a gymnasium.Env")
    try:
        states, actions = env.observation_space, env.action_space
        boxes = [isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (states, actions)]
        if not all(boxes) or not actions.is_bounded() or actions.dtype.kind != "f":
            raise DDPGError(f"observations {states} and actions {actions} must each be a Box of "
                            "one dimension, actions bounded and of floats: wrap the environment")
        if not env.has_wrapper_attr("_max_episode_steps"):
            env = gym.wrappers.TimeLimit(env, 1000)
        env = Checked(env)
        env.reset(seed=0)  # a state that is not supported shows here, not after training
    except BaseException:
        env.close()
        raise
    return env


def expected(agent, s):
    """Q(s, mu(s)) of one state, in the environment's units of reward; None before any learning."""
    if agent.buffer.steps < agent.settings.warmup:
        return None
    s = agent.buffer.standardize(s)
    a = mu(agent.actor.get_weights(), s)
    value = forward(agent.critic.get_weights(), np.concatenate([s, a]))
    return agent.buffer.reward_rms * value.item()


def evaluate(agent, env):
    """Ten episodes of the final actor without noise: yields the return of each."""
    env = make(env)
    weights = agent.final_actor.get_weights()
    for seed in EVALUATION_SEEDS:
        s, _ = env.reset(seed=seed)
        episode_return = 0.0
        done = False
        while not done:
            a = mu(weights, agent.buffer.standardize(s))
            s, r, terminated, truncated, _ = env.step(rescale(a, agent.action_space))
            episode_return += r
            done = terminated or truncated
        yield episode_return


def policy(agent):
    """A copy of the final actor as a Keras model (N, state_size) -> (N, action_size), with states
    and actions in the environment's units."""
    buffer = agent.buffer
    middle = rescale(0, agent.action_space)
    high = rescale(1, agent.action_space)
    return keras.Sequential([
        keras.Input(buffer.mean.shape),
        keras.layers.Rescaling(1 / buffer.std, -buffer.mean / buffer.std),
        copy.deepcopy(agent.final_actor),
        keras.layers.Rescaling(high - middle, middle),
    ])


def plot(agent):
    """The figure of a training. Above, the return of each episode and the mean of the last ten;
    below, the discounted return and what the critic had expected of it."""
    history = np.reshape(agent.history, (-1, 4)).astype(float)  # also of no episode
    steps, returns, discounted, value = history.T
    means = [returns[i:i + 10].mean() for i in range(len(returns) - 9)]
    figure, (above, below) = plt.subplots(
        2, num="ddpg.py", clear=True, sharex=True, layout="constrained")
    above.set(title=f"{agent.settings.env}, seed {agent.settings.seed}", ylabel="return")
    above.plot(steps, returns, ".", label="episode")
    above.plot(steps[9:], means, label="mean of the last ten")
    above.legend()
    below.set(xlabel="environment steps", ylabel="discounted return")
    below.plot(steps, discounted, ".", label="that came")
    below.plot(steps, value, ".", label="that the critic expected")
    below.legend()
    return figure


def learned(agent):
    """All variables that learning changes, by name; learning rates are settings."""
    parts = ("actor", "critic", "target_actor", "target_critic", "final_actor",
             "actor_optimizer", "critic_optimizer")
    variables = {f"{part}_{i}": variable for part in parts
                 for i, variable in enumerate(getattr(agent, part).variables)
                 if variable.name != "learning_rate"}
    variables["ended"] = agent.ended  # + doubt
    return variables


def save(agent, path):
    """Write all that further training needs, whole or not at all. DDPGError if it cannot be
    written, FloatingPointError if it is not finite."""
    buffer = agent.buffer
    space = agent.action_space
    arrays = {name: np.asarray(variable) for name, variable in learned(agent).items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise FloatingPointError("a weight is not finite")
    part = Path(path).with_suffix(".part.npz")
    with explained(f"cannot write {path}: make room, or choose another --out", OSError):
        part.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, settings=json.dumps(agent.settings._asdict()),
                 history=json.dumps(agent.history), rows=buffer.rows[:buffer.steps],
                 mean=buffer.mean, std=buffer.std, reward_rms=buffer.reward_rms,
                 bounds=[space.low, space.high], **arrays)
        part.replace(path)


def read(path):
    """What `save` wrote, by name. DDPGError if it is not there or damaged."""
    with explained(f"cannot read {path}: train first, or choose another --out", Exception):
        with np.load(path) as file:
            saved = dict(file)
        settings = make_settings(**json.loads(str(saved["settings"])))
        return saved | {"settings": settings, "history": json.loads(str(saved["history"]))}


def load(env, path, /, **changes):
    """The agent that `save` wrote, with `changes` of its settings. DDPGError if it cannot be read,
    if the environment is another one, or for a change of what belongs to the run."""
    saved = read(path)
    old = saved["settings"]._asdict()
    settings = make_settings(**old | changes)
    for name in OF_THE_RUN:
        if getattr(settings, name) != old[name]:
            raise DDPGError(f"{name} {changes[name]}: the run in {path} has {old[name]}, omit it")
    agent = Agent(env, settings)
    agent.history = saved["history"]
    buffer = agent.buffer
    space = env.action_space
    with explained(f"cannot go on with {path}: choose another --out", KeyError, ValueError):
        rows = saved["rows"]
        same_bounds = np.array_equal(saved["bounds"], [space.low, space.high])
        if rows.dtype != buffer.rows.dtype or not same_bounds:
            raise ValueError("its environment had other states, actions or bounds")
        buffer.rows[:len(rows)] = rows
        buffer.steps = agent.history[-1][0] if agent.history else 0
        buffer.mean = saved["mean"]
        buffer.std = saved["std"]
        buffer.reward_rms = saved["reward_rms"].item()
        for name, variable in learned(agent).items():
            variable.assign(saved[name])
    return agent


def write_results(agent, out):
    """Renew returns.csv, actor.keras and returns.png in `out`. Returns the error if that fails."""
    try:
        with open(out / "returns.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["episode", "steps", "return", "discounted", "value"])
            writer.writerows([i, *row] for i, row in enumerate(agent.history, 1))
        if all(np.isfinite(weight).all() for weight in agent.final_actor.get_weights()):
            policy(agent).save(out / "actor.keras")
        plot(agent).savefig(out / "returns.png")
    except Exception as error:  # of the disk, or anything that matplotlib is set to use
        return error


def run(agent, env, out):
    """Train, with a checkpoint and results in the folder `out` every ten seconds and, whatever
    happens, at the end; evaluate. DDPGError if the folder cannot be used, Stopped later on."""
    out = Path(out).absolute()
    save(agent, out / "checkpoint.npz")  # what cannot be written fails here, not after training
    print("TensorFlow compiles the gradient step, which takes some seconds.\n"
          " episode      step      return  mean of ten  discounted       value  steps/s  time left",
          flush=True)
    first_step = agent.buffer.steps
    began = time.perf_counter()
    print_at = began
    save_at = began + SAVE_EVERY
    try:
        for _ in train(agent, env):
            now = time.perf_counter()
            step = agent.buffer.steps
            if now >= print_at or step >= agent.settings.steps:
                last_ten = np.array(agent.history[-10:], float)
                _, episode_return, discounted, value = last_ten[-1]
                mean = last_ten[:, 1].mean()
                speed = (step - first_step) / max(now - began, 1e-9)
                left = max(0, agent.settings.steps - step) / speed
                print(f"{len(agent.history):8}{step:10}{episode_return:12.5g}{mean:13.5g}"
                      f"{discounted:12.5g}{value:12.5g}{speed:9.0f}{left:9.0f} s", flush=True)
                print_at = now + 1
            if now >= save_at:
                save(agent, out / "checkpoint.npz")
                write_results(agent, out)
                save_at = now + max(SAVE_EVERY, 20 * (time.perf_counter() - now))
        save(agent, out / "checkpoint.npz")
        mean = np.mean(list(evaluate(agent, env)))
    except FloatingPointError as error:
        state = abs(agent.buffer.rows["s_next"]).max()
        reward = abs(agent.buffer.rows["r"]).max()
        raise Stopped(f"episode {len(agent.history) + 1}: {error}: try lower learning rates, or "
                      f"other units if the largest state remembered, {state:.3g}, or the largest "
                      f"reward, {reward:.3g}, is far from the others") from error
    except DDPGError as error:
        raise Stopped(f"episode {len(agent.history) + 1}: {error}") from error
    finally:
        problem = write_results(agent, out)
    print(f"mean return of ten episodes without noise: {mean:.5g}; results in {out}")
    if problem:
        raise Stopped(f"cannot write to {out}: mend this, then --resume ({problem})")


def gif(agent, path):
    """Play one episode of the final actor into `path`. DDPGError if it cannot be drawn."""
    failed = f"cannot draw --env {agent.settings.env} into {path}"
    with explained(failed, gym.error.Error, ImportError, NotImplementedError):
        with make(agent.settings.env, render_mode="rgb_array") as env:
            film = Checked(gym.wrappers.RenderCollection(env))
            episode_return = next(evaluate(agent, film))
            frames = film.render()
    with explained(failed, Exception):
        first, *rest = [keras.utils.array_to_img(frame, scale=False) for frame in frames]
        first.save(path, save_all=True, append_images=rest, loop=0,
                   duration=max(20, 1000 / (env.metadata.get("render_fps") or 30)))
    print(f"return {episode_return:.5g}, drawn into {path}")


def new_run(path, given):
    names = ("checkpoint.npz", "returns.csv", "actor.keras", "returns.png")
    found = [name for name in names if os.path.exists(path.with_name(name))]
    if found and ("checkpoint.npz" not in found or read(path)["history"]):
        raise DDPGError(f"--out {path.parent} holds {found}: add --resume (and more --steps if the "
                        "run is finished) to go on, choose another --out, or delete the folder")
    settings = make_settings(**given)
    with make(settings.env) as env:
        run(Agent(env, settings), env, path.parent)


def old_run(path, given, draw):
    with make(read(path)["settings"].env) as env:
        agent = load(env, path, **given)
        if not draw:
            return run(agent, env, path.parent)
        if "rgb_array" not in env.metadata.get("render_modes", []):
            raise DDPGError(f"cannot draw {agent.settings.env}: it has no render_mode rgb_array")
    gif(agent, path.with_name("policy.gif"))


def main(arguments=None):
    """The command line. Returns 0, 1 (training failed), 2 (refused) or 130 (interrupted)."""
    parser = argparse.ArgumentParser("ddpg.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    for name, (default, meaning) in OPTIONS.items():
        kind, count = (int, "+") if name == "hidden" else (type(default), None)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, nargs=count,
                            help=f"{meaning} (default: {default})")
    parser.add_argument("--out", help="results folder (default: runs/<env>-seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--gif", action="store_true", help="play its policy once into policy.gif")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out", None)
    resume = given.pop("resume", False)
    draw = given.pop("gif", False)
    folder = "{0.env}-seed{0.seed}".format(Settings(**given)).replace(":", "-").replace("/", "-")
    path = Path(os.path.expanduser(out or f"runs/{folder}"), "checkpoint.npz").absolute()
    try:
        if resume or draw:
            old_run(path, given, draw)
        else:
            new_run(path, given)
    except DDPGError as error:
        print("ddpg.py:", *str(error).split(), file=sys.stderr)  # in one line
        return error.status
    except KeyboardInterrupt:
        goes_on = path.exists() and not draw
        advice = f': python ddpg.py --resume --out "{path.parent}" goes on'
        print("\ninterrupted" + goes_on * advice)
        return 130
    with contextlib.suppress(KeyboardInterrupt):  # it closes the window
        if not draw and plt.get_backend().lower() != "agg":
            plt.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
