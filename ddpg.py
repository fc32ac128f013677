"""Deep Deterministic Policy Gradient (DDPG) in one file, to be read beside its theory.

An actor mu maps a state s to an action a; a critic Q estimates the return that follows (s, a);
slow copies of both, the targets mu' and Q', keep the critic from chasing its own estimates. This is
Algorithm 1 of Lillicrap et al. 2015 (arXiv:1509.02971); + marks additions. README.md explains it:

    networks mu and Q                              ann                  section 2
    a state checked, an action within its bounds   observe, in_bounds   section 3
    memory of (s, a, r, s', d); + standard units   ReplayBuffer         section 4
    theta' <- tau theta' + (1 - tau) theta         soft_update          section 5
    critic's loss (y - Q(s, a))^2                  Agent.critic_loss    section 6
    actor's loss -Q(s, mu(s)); + a toll            Agent.actor_loss     section 7
    gradient steps; + an average of the actor      Agent.learn          section 8
    the loop: act with noise, remember, learn      train                section 9

`python ddpg.py` teaches a pendulum to stand up; `python ddpg.py --help` lists every setting.
"""

import argparse
import contextlib
import copy
import json
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np

quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}  # what is set stays
os.environ.update(quiet | os.environ | {"KERAS_BACKEND": "tensorflow"})
import keras
import tensorflow as tf

OPTIONS = {  # name: default, least, most, meaning
    "env": ("Pendulum-v1", None, None, "Gymnasium environment; module:Name-v0 for your own"),
    "steps": (20_000, 1, 10**9, "environment steps to train, and to the end of the episode"),
    "seed": (0, 0, 2**31 - 1, "source of all randomness"),
    "hidden": ([64, 64, 64], 1, 10**5, "hidden layer sizes of both networks"),
    "actor_lr": (1e-3, 0, 1, "learning rate of the actor"),
    "critic_lr": (2e-3, 0, 1, "learning rate of the critic"),
    "gamma": (0.99, 0, 1, "discount per step"),
    "tau": (0.98, 0, 1, "share of itself that a target keeps; the paper's tau is 1 - this"),
    "noise": (0.2, 0, 10, "sigma of the exploration noise; 1 is half an action's range"),
    "noise_theta": (1.0, 0, 1, "share of the noise forgotten per step; the paper's is 0.15"),
    "batch_size": (128, 1, 10**6, "transitions in a batch, N"),
    "buffer_size": (100_000, 1, 10**8, "transitions remembered"),
    "warmup": (200, 1, 10**9, "environment steps before learning, with random actions"),
    "block": (50, 1, 10**6, "environment steps, then as many gradient steps; the paper's is 1"),
}


class DDPGError(ValueError):
    """What is unfit, or why training cannot go on: one line with the value and the remedy."""


def ann(input_size, layer_sizes, output_activation):
    """A network (N, input_size) -> (N, layer_sizes[-1]), its hidden layers relu (section 2)."""
    *hidden, last = layer_sizes
    return keras.Sequential([
        keras.Input((input_size,)), *[keras.layers.Dense(size, "relu") for size in hidden],
        keras.layers.Dense(last), keras.layers.Activation(output_activation)])


def observe(state, space):
    """The state as a float32 copy (section 3). DDPGError if not finite, or of another shape."""
    state = np.array(state, np.float32)
    if state.shape != space.shape or not np.isfinite(state).all():
        raise DDPGError(f"state {state}, shape {state.shape}: must be finite, shape {space.shape}")
    return state


def in_bounds(a, space):
    """An action in [-1, 1]^m in the units of its space: -1 is its low, 1 its high (section 3)."""
    low, high = space.low.astype(float), space.high.astype(float)
    return np.clip((high + low) / 2 + (high - low) / 2 * a, low, high).astype(space.dtype)


class ReplayBuffer:
    """The last `capacity` transitions, a float32 row each: s, a, r, s', d (section 4). d is 1 where
    the episode terminated in s', else 0, also at a time limit. DDPGError: an unfit reward."""

    def __init__(self, capacity, state_size, action_size):
        self.ends = np.cumsum([state_size, action_size, 1, state_size])  # where s, a, r, s' end
        self.rows = np.zeros((capacity, self.ends[-1] + 1), np.float32)
        self.added = 0  # rows ever added: the number of environment steps so far
        self.mean, self.deviation, self.reward_size = np.zeros(state_size), np.ones(state_size), 1.0

    def add(self, s, a, r, s_next, d):
        if np.shape(r) or not abs(r) < 3.4e38:  # where float32 ends; nan is not below it either
            raise DDPGError(f"reward {r} is not one finite number: correct the environment")
        self.rows[self.added % len(self.rows)] = np.concatenate([s, a, [r], s_next, [d]])
        self.added += 1

    def measure(self):
        """Measure the remembered states, and the root mean square of the rewards."""
        s, _, r, *_ = np.split(self.rows[:self.added].astype(float), self.ends, axis=1)
        self.mean, deviation = s.mean(axis=0), s.std(axis=0)
        self.deviation = np.where(deviation > 1e-7 * abs(self.mean), deviation, 1)  # 1 if at rest
        self.reward_size = (r**2).mean() ** 0.5 or 1.0

    def standard(self, s):
        """States (..., state_size) in standard units, those in which mean is 0 and deviation 1."""
        return ((s - self.mean) / self.deviation).astype(np.float32)

    def sample(self, rng, *shape):
        """Random rows as s, a, r, s', d, each (*shape, its width), in standard units."""
        rows = self.rows.take(rng.integers(min(self.added, len(self.rows)), size=shape), axis=0)
        s, a, r, s_next, d = np.split(rows, self.ends, axis=-1)
        return self.standard(s), a, r / np.float32(self.reward_size), self.standard(s_next), d


def soft_update(target, network, tau):
    """theta' <- tau theta' + (1 - tau) theta (section 5). tau near 1: the target follows slowly."""
    for slow, fast in zip(target.variables, network.variables):
        slow.assign(tau * slow + (1 - tau) * fast)


class Agent:
    """Networks, optimizers, memory, and history: [steps so far, return] of each episode. Networks
    and losses take states in standard units, actions in [-1, 1]^m. DDPGError for unfit spaces."""

    def __init__(self, env, settings):
        states, actions = env.observation_space, env.action_space
        boxes = [isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (states, actions)]
        if not (all(boxes) and actions.is_bounded() and actions.dtype.kind == "f"):
            raise DDPGError(f"observations {states} and actions {actions} must each be a Box of "
                            "one dimension, actions bounded and of floats: wrap the environment")
        observe(env.reset(seed=settings.seed)[0], states)  # an unfit state shows here, not later
        (state_size,), (action_size,) = states.shape, actions.shape
        self.settings, self.action_space, self.history = settings, actions, []
        self.buffer = ReplayBuffer(settings.buffer_size, state_size, action_size)
        keras.utils.set_random_seed(settings.seed)  # for the first weights
        self.actor = ann(state_size, [*settings.hidden, action_size], "tanh")
        self.critic = ann(state_size + action_size, [*settings.hidden, 1], "linear")
        self.target_actor, self.target_critic = copy.deepcopy((self.actor, self.critic))
        self.average_actor = copy.deepcopy(self.actor)  # the final policy (section 8)
        self.before_tanh = keras.Sequential(self.actor.layers[:-1])  # x of tanh(x), same weights
        for network, rate in (self.actor, settings.actor_lr), (self.critic, settings.critic_lr):
            network.optimizer = keras.optimizers.Adam(rate)
            network.optimizer.build(network.trainable_variables)  # in `learn` it is too late

    def critic_loss(self, s, a, r, s_next, d):
        """L = 1/N sum (y - Q(s, a))^2 with y = r + gamma (1 - d) Q'(s', mu'(s')) (section 6).
        s, s_next: (N, state_size); a: (N, action_size); r, d: (N, 1), as (N,) makes y (N, N)."""
        q_next = self.target_critic(tf.concat([s_next, self.target_actor(s_next)], axis=1))
        y = r + self.settings.gamma * (1 - d) * q_next  # constant for the critic's weights
        return tf.reduce_mean((y - self.critic(tf.concat([s, a], axis=1))) ** 2)

    def actor_loss(self, s):
        """J = -1/N sum Q(s, mu(s)), + a toll where tanh is flat (section 7); s: (N, state_size)."""
        x = self.before_tanh(s)  # mu(s) = tanh(x)
        q = self.critic(tf.concat([s, tf.tanh(x)], axis=1))
        toll = tf.reduce_mean(tf.nn.relu(tf.abs(x) - 5) ** 2)
        return -tf.reduce_mean(q) + toll

    @tf.function(jit_compile=True)  # compiled: all gradient steps are one call from Python
    def learn(self, batches):
        """A gradient step of both networks for each of k batches: arrays s, a, r, s', d, each
        (k, N, width) (section 8). The sum it returns is finite if all losses and weights are."""
        total = 0.0
        for i in tf.range(len(batches[0])):  # range instead would compile k copies of the body
            s, a, r, s_next, d = [column[i] for column in batches]
            with tf.GradientTape() as tape:
                critic_loss = self.critic_loss(s, a, r, s_next, d)
            self.critic.optimizer.apply(tape.gradient(critic_loss, self.critic.trainable_variables))

            with tf.GradientTape() as tape:
                actor_loss = self.actor_loss(s)
            self.actor.optimizer.apply(tape.gradient(actor_loss, self.actor.trainable_variables))

            soft_update(self.target_critic, self.critic, self.settings.tau)
            soft_update(self.target_actor, self.actor, self.settings.tau)
            t = tf.cast(self.actor.optimizer.iterations, tf.float32)  # gradient steps so far
            soft_update(self.average_actor, self.actor, t / (t + 4))  # mostly the last quarter
            total += critic_loss + actor_loss
        return tf.add_n([total, *map(tf.reduce_sum, self.actor.variables + self.critic.variables)])


def mu(weights, s):
    """mu(s) of one state in standard units, in NumPy: Keras takes 100 times as long (section 8)."""
    *hidden, kernel, bias = weights
    for w, b in zip(hidden[::2], hidden[1::2]):
        s = np.maximum(s @ w + b, 0)
    return np.tanh(s @ kernel + bias)


def train(agent, env):
    """Algorithm 1 (section 9). Yields each episode's undiscounted return; a run can be saved there,
    as each episode draws random numbers of its own. DDPGError if something is not finite."""
    settings, buffer, weights = agent.settings, agent.buffer, agent.actor.get_weights()
    while buffer.added < settings.steps:
        rng = np.random.default_rng([settings.seed, len(agent.history)])
        s = observe(env.reset(seed=int(rng.integers(2**31)))[0], env.observation_space)
        n, episode_return, over = np.zeros(env.action_space.shape), 0.0, False
        while not over:
            if buffer.added < settings.warmup:
                a = rng.uniform(-1, 1, n.shape)
            else:
                n = (1 - settings.noise_theta) * n + settings.noise * rng.standard_normal(n.shape)
                a = np.clip(mu(weights, buffer.standard(s)) + n, -1, 1)
            s_next, r, terminated, truncated, _ = env.step(in_bounds(a, env.action_space))
            s_next, r = observe(s_next, env.observation_space), np.array(r, float).squeeze()
            buffer.add(s, a, r, s_next, bool(terminated))  # a time limit is no end
            s, over, episode_return = s_next, terminated or truncated, episode_return + float(r)
            since_warmup = buffer.added - settings.warmup
            if since_warmup >= 0 and since_warmup % settings.block == 0:
                if since_warmup <= 10_000:  # later, new units would unsettle what was learned
                    buffer.measure()
                batches = buffer.sample(rng, settings.block, settings.batch_size)
                if not np.isfinite(agent.learn(batches)):
                    raise DDPGError("a loss or weight is not finite: try lower learning rates")
                weights = agent.actor.get_weights()
        agent.history.append([buffer.added, episode_return])
        yield episode_return


# That is DDPG. What follows evaluates the policy, plots, saves, and reads the command line.
EVALUATION_SEEDS = range(1_000_000, 1_000_010)  # the same ten starts for every run
SAVE_EVERY = 10  # seconds between checkpoints


@contextlib.contextmanager
def explained(sentence, *errors):
    """Any of `errors` within becomes a DDPGError that begins with `sentence`."""
    try:
        yield
    except errors as error:
        raise DDPGError(f"{sentence} ({str(error) or repr(error)})") from error


def make_settings(**changes):
    """The defaults of OPTIONS with `changes`, as a namespace. DDPGError if one is out of range."""
    settings = argparse.Namespace(**({name: row[0] for name, row in OPTIONS.items()} | changes))
    for name, value in vars(settings).items():
        _, least, most, _ = OPTIONS[name]
        if least is not None and not all(least <= n <= most for n in np.ravel(value)):
            raise DDPGError(f"{name} {value} is out of range: choose {least} to {most}")
    if settings.steps <= settings.warmup:
        raise DDPGError(f"steps {settings.steps}: choose more than the {settings.warmup} of warmup")
    return settings


def evaluate(agent, env):
    """Ten episodes of the average actor without noise: yields the return of each. One that does
    not end is cut off after ten times the length of the longest in training."""
    longest = max(np.diff([0, *[step for step, _ in agent.history]]), default=agent.settings.steps)
    env, weights = gym.wrappers.TimeLimit(env, 10 * int(longest)), agent.average_actor.get_weights()
    for seed in EVALUATION_SEEDS:
        s, episode_return, over = env.reset(seed=seed)[0], 0.0, False
        while not over:
            a = mu(weights, agent.buffer.standard(observe(s, env.observation_space)))
            s, r, terminated, truncated, _ = env.step(in_bounds(a, env.action_space))
            over, episode_return = terminated or truncated, episode_return + float(np.squeeze(r))
        yield episode_return


def policy(agent):
    """The average actor as a Keras model (N, state_size) -> (N, action_size) in the env's units."""
    mean, deviation = agent.buffer.mean, agent.buffer.deviation
    middle, highest = in_bounds(0, agent.action_space), in_bounds(1, agent.action_space)
    return keras.Sequential([
        keras.Input(mean.shape), keras.layers.Rescaling(1 / deviation, -mean / deviation),
        agent.average_actor, keras.layers.Rescaling(highest - middle, middle)])


def plot(history):
    """The figure of a training: the return of each episode, and the mean of the last ten."""
    figure, axes = plt.subplots(num="ddpg.py", clear=True, layout="constrained")
    steps, returns = np.reshape(history, (-1, 2)).T  # also of no episode
    means = [returns[i:i + 10].mean() for i in range(len(returns) - 9)]
    axes.plot(steps, returns, ".", alpha=0.5, label="episode")
    axes.plot(steps[9:], means, label="mean of the last ten")
    axes.set(xlabel="environment steps", ylabel="return")
    axes.legend()
    return figure


def variables(agent):
    """All that learning changes, always in this order; learning rates are settings."""
    parts = (agent.actor, agent.critic, agent.target_actor, agent.target_critic,
             agent.average_actor, agent.actor.optimizer, agent.critic.optimizer)
    return [v for part in parts for v in part.variables if v.name != "learning_rate"]


def save(agent, path):
    """Write all that further training needs, whole or not at all. DDPGError if that fails."""
    part, buffer = path.with_suffix(".part.npz"), agent.buffer  # savez wants .npz at the end
    texts = json.dumps(vars(agent.settings)), json.dumps(agent.history)
    arrays = [*texts, buffer.rows[:buffer.added], buffer.mean, buffer.deviation,
              buffer.reward_size, *variables(agent)]
    with explained(f"cannot write {path}: make room, or choose another --out", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, *map(np.asarray, arrays))
        part.replace(path)


def read(path):
    """What `save` wrote: settings, history, arrays. DDPGError if it is not there or damaged."""
    with explained(f"cannot read {path}: train first, or choose another --out", Exception):
        with np.load(path) as file:
            settings, history, *arrays = file.values()
        return vars(make_settings(**json.loads(str(settings)))), json.loads(str(history)), arrays


def restore(agent, history, arrays):
    """Become the agent that was saved. DDPGError if it had other sizes."""
    buffer = agent.buffer
    with explained("the environment had other sizes: choose another --out", ValueError):
        rows, buffer.mean, buffer.deviation, buffer.reward_size, *values = arrays
        buffer.rows[:len(rows)] = rows
        for variable, value in zip(variables(agent), values, strict=True):
            variable.assign(value)
    agent.history, buffer.added = history, history[-1][0] if history else 0


def run(agent, env, out):
    """Train, with checkpoints and, whatever happens, results in the folder `out`; evaluate."""
    history, steps, step = agent.history, agent.settings.steps, agent.buffer.added
    began, first_step, save_at, limit = time.perf_counter(), step, 0, max(10 * steps, 10_000)
    try:
        for episode_return in train(agent, gym.wrappers.TimeLimit(env, limit)):
            before, step, now = step, agent.buffer.added, time.perf_counter()
            if step - before == limit:
                history.pop()  # as it has no end, it has no return
                raise DDPGError(f"no end in {limit} steps: register it with max_episode_steps")
            print(f"episode {len(history)}, step {step}/{steps}, return {episode_return:.5g}, "
                  f"mean of ten {np.mean(history[-10:], axis=0)[1]:.5g}, "
                  f"{(step - first_step) / (now - began):.0f} steps/s", flush=True)
            if now >= save_at:
                save(agent, out / "checkpoint.npz")
                save_at = now + max(SAVE_EVERY, 20 * (time.perf_counter() - now))
        save(agent, out / "checkpoint.npz")
    except DDPGError as error:
        raise DDPGError(f"episode {len(history) + 1}: {error}") from error
    finally:
        rows = [f"{i},{step},{total}\n" for i, (step, total) in enumerate(history, 1)]
        with explained(f"cannot write to {out}: make room, then --resume", OSError):
            (out / "returns.csv").write_text("episode,steps,return\n" + "".join(rows))
            if all(np.isfinite(weight).all() for weight in agent.average_actor.get_weights()):
                policy(agent).save(out / "actor.keras")
            plot(history).savefig(out / "returns.png")
    mean = np.mean(list(evaluate(agent, env)))
    print(f"mean return of ten episodes without noise: {mean:.5g}; results in {out}")


def gif(agent, path):
    """Play one episode of the average actor into `path`. DDPGError if it cannot be drawn."""
    with explained(f"cannot draw --env {agent.settings.env} into {path}", Exception):
        env = gym.make(agent.settings.env, render_mode="rgb_array_list")
        episode_return = next(evaluate(agent, env))
        first, *rest = [keras.utils.array_to_img(frame, scale=False) for frame in env.render()]
        first.save(path, save_all=True, append_images=rest, loop=0,
                   duration=max(20, 1000 / (env.metadata.get("render_fps") or 30)))
        print(f"return {episode_return:.5g}, drawn into {path}")


def main(arguments=None):
    """The command line. Returns 0, 1 (training failed), 2 (refused) or 130 (interrupted)."""
    parser = argparse.ArgumentParser("ddpg.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    for name, (default, _, _, meaning) in OPTIONS.items():
        kind, count = (int, "+") if name == "hidden" else (type(default), None)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, nargs=count,
                            help=f"{meaning} (default: {default})")
    parser.add_argument("--out", type=Path, help="results folder (default: runs/<env>-seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--gif", action="store_true", help="play its policy once into policy.gif")
    asked = vars(parser.parse_args(arguments))
    given = {name: asked[name] for name in OPTIONS if asked[name] is not None}
    env_id, seed = (given.get(name, OPTIONS[name][0]) for name in ("env", "seed"))
    out = asked["out"] or Path("runs", f"{env_id}-seed{seed}".replace(":", "-").replace("/", "-"))
    path, reuse, status = out / "checkpoint.npz", asked["resume"] or asked["gif"], 2
    try:
        kept, history, arrays = read(path) if reuse or os.path.exists(path) else ({}, [], [])
        settings = make_settings(**(kept | given if reuse else given))
        if history and not reuse:
            raise DDPGError(f"--out {out} holds a run: add --resume (and more --steps if it is "
                            "finished) to go on, choose another --out, or delete the folder")
        for name in {"env", "seed", "hidden", "buffer_size"} & given.keys():
            if reuse and given[name] != kept[name]:
                raise DDPGError(f"{name} {given[name]}: the run in {out} has {kept[name]}, omit it")
        with explained(f"--env {settings.env}: choose another", gym.error.Error, ImportError):
            env = gym.make(settings.env)
        agent = Agent(env, settings)
        if reuse:
            restore(agent, history, arrays)
        if asked["gif"]:
            gif(agent, out / "policy.gif")
            return 0
        save(agent, path)  # what cannot be written fails here, not after training
        status = 1
        run(agent, env, out)
        if plt.get_backend().lower() != "agg":  # which has no windows
            plt.show()
        return 0
    except DDPGError as error:
        print("ddpg.py:", *str(error).split(), file=sys.stderr)  # in one line
        return status
    except KeyboardInterrupt:
        print(f'\ninterrupted: python ddpg.py --resume --out "{out}" goes on')
        return 130


if __name__ == "__main__":
    sys.exit(main())
