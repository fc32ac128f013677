"""Deep Deterministic Policy Gradient (DDPG) in one file, to be read beside its theory.

An actor mu maps a state s to an action a; a critic Q estimates the return that follows the pair.
The critic learns from replayed transitions, the actor climbs the critic's slope, and slow copies of
both, the targets mu' and Q', keep the critic from chasing its own estimates. Algorithm 1 of
Lillicrap et al. 2015 (arXiv:1509.02971) is the map of this file; sections are those of README.md:

    networks mu, Q and their targets            ann, Agent           section 2
    exploration a = mu(s) + n                   Noise                section 3
    memory of transitions (s, a, r, s', d)      ReplayBuffer         section 4
    critic's loss (y - Q(s, a))^2               Agent.critic_loss    section 5
    actor's loss -Q(s, mu(s))                   Agent.actor_loss     section 6
    theta' <- tau theta' + (1 - tau) theta      soft_update          section 7
    for each episode, for each step             train                section 8

`python ddpg.py` teaches a pendulum to stand up; `python ddpg.py --help` lists every setting.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
saved_stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorFlow's first lines heed no log level
try:
    import keras
    import tensorflow as tf
finally:
    os.dup2(saved_stderr, 2)

EVALUATION_SEEDS = range(1_000_000, 1_000_010)  # the same ten starts for every run
SAVE_EVERY = 20  # seconds between checkpoints


class Parser(argparse.ArgumentParser):
    """Every setting that decides a run, with its meaning, range and default."""

    def __init__(self):
        super().__init__(description="Train a DDPG agent, resume its training, or watch it.",
                         allow_abbrev=False)
        self.add("env", "Pendulum-v1", "Gymnasium environment; module:Name-v0 for one of your own")
        self.add("episodes", 100, "episodes to train", least=1)
        self.add("seed", 0, "source of all randomness")
        self.add("hidden", [64, 64], "hidden layer sizes of both networks", least=1)
        self.add("actor-lr", 1e-3, "learning rate of the actor")
        self.add("critic-lr", 2e-3, "learning rate of the critic")
        self.add("gamma", 0.99, "discount per step", most=1)
        self.add("tau", 0.99, "share of itself that a target keeps; the paper's is 1 - tau", most=1)
        self.add("q-scale", 10.0, "unit of the critic's output, in rewards", least=1e-9)
        self.add("noise", 0.1, "sigma of the exploration noise, in half action ranges")
        self.add("noise-theta", 1.0, "1: white noise, 0.15: Ornstein-Uhlenbeck", most=1)
        self.add("batch-size", 64, "transitions in a batch, N", least=1)
        self.add("buffer-size", 100_000, "transitions remembered", least=1)
        self.add("warmup", 200, "first steps, with random actions and no training", least=1)
        self.add("train-every", 50, "environment steps in a block; the paper's is 1", least=1)
        self.add("updates", 1.0, "gradient steps per environment step")

    def add(self, name, default, meaning, least=0, most=np.inf):
        kind = type(np.ravel(default)[0].item())

        def number(text):
            value = kind(text)
            if kind is not str and not (least <= value <= most and value < np.inf):
                bounds = f"{least} or more" if most == np.inf else f"{least} to {most}"
                raise argparse.ArgumentTypeError(f"{text} is out of range: choose {bounds}")
            return value

        number.__name__ = kind.__name__  # argparse names it when the text is no such number
        several = "*" if isinstance(default, list) else None
        self.add_argument(f"--{name}", type=number, nargs=several, default=default, metavar="X",
                          help=f"{meaning} (default: %(default)s)")

    def error(self, message):
        raise ValueError(message)


def settings(**changes):
    """The default settings but for `changes`. Raises ValueError naming what is out of range."""
    return Parser().parse_args([word for name, value in changes.items() for word in
                                ("--" + name.replace("_", "-"), *map(str, np.ravel(value)))])


def ann(input_size, layer_sizes, output_activation, rng):
    """A network (N, input_size) -> (N, layer_sizes[-1]), its hidden layers relu (section 2).

    The actor's output activation is "tanh"; the critic's is None, linear. The last layer starts
    near 0, as in the paper, so that no action starts at its bound. `rng` seeds the weights.
    """
    seeds = iter(rng.integers(2**31, size=len(layer_sizes)).tolist())
    network = keras.Sequential([keras.Input((input_size,))])
    for size in layer_sizes[:-1]:
        start = keras.initializers.GlorotUniform(next(seeds))
        network.add(keras.layers.Dense(size, "relu", kernel_initializer=start))
    start = keras.initializers.RandomUniform(-3e-3, 3e-3, next(seeds))
    network.add(keras.layers.Dense(layer_sizes[-1], output_activation, kernel_initializer=start))
    return network


class Noise:
    """n <- (1 - theta) n + sigma N(0, I), added to actions from outside the actor (section 3)."""

    def __init__(self, size, sigma, theta, rng):
        self.n, self.sigma, self.theta, self.rng = np.zeros(size), sigma, theta, rng

    def reset(self):
        self.n = np.zeros_like(self.n)

    def sample(self):
        self.n = (1 - self.theta) * self.n + self.sigma * self.rng.standard_normal(self.n.shape)
        return self.n


class ReplayBuffer:
    """The last `capacity` transitions (section 4), a float32 row each: s, a, r, s', d.

    d is 1 where the episode terminated in s', 0 where it went on or was cut off by a time limit.
    """

    def __init__(self, capacity, state_size, action_size):
        self.rows = np.zeros((capacity, 2 * state_size + action_size + 2), np.float32)
        self.added = 0  # since the beginning, so this also counts the environment's steps

    def __len__(self):
        return min(self.added, len(self.rows))

    def add(self, state, action, reward, next_state, terminated):
        row = np.concatenate([state, action, [reward], next_state, [terminated]], dtype=np.float32)
        if not np.isfinite(row).all():
            raise FloatingPointError("the environment gave a state or reward that is not finite")
        self.rows[self.added % len(self.rows)] = row
        self.added += 1

    def sample(self, rng, *shape):
        """Rows drawn uniformly with replacement, shape + (row,): a batch, or a stack of batches."""
        return self.rows.take(rng.integers(len(self), size=shape), axis=0)


def soft_update(targets, sources, tau):
    """theta' <- tau theta' + (1 - tau) theta (section 7). tau near 1: the targets follow slowly."""
    for target, source in zip(targets, sources):
        target.assign(tau * target + (1 - tau) * source)


class Agent:
    """Four networks, two optimizers, the memory, and the history [(steps so far, return), ...].

    Learns in any `env` with one-dimensional Box observations (n,) and bounded Box actions (m,), in
    the environment's own units throughout. ValueError if `env` or the settings do not fit.
    """

    def __init__(self, env, settings):
        for space, bounds in ((env.observation_space, ""), (env.action_space, " of finite bounds")):
            if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1
                    and (space.is_bounded() or not bounds)):
                raise ValueError(f"environment {env.unwrapped}: {space} is not a one-dimensional "
                                 f"Box{bounds}: wrap the environment, or choose another")
        if settings.batch_size > min(settings.warmup, settings.buffer_size):
            raise ValueError(f"--batch-size {settings.batch_size} is more than --warmup "
                             f"{settings.warmup} or --buffer-size {settings.buffer_size}: "
                             "lower the one or raise the other")
        (n,), (m,) = env.observation_space.shape, env.action_space.shape
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)
        self.buffer, self.history = ReplayBuffer(settings.buffer_size, n, m), []
        self.columns = [n, m, 1, n, 1]  # of the buffer's rows: s, a, r, s', d
        self.low, self.high = env.action_space.low, env.action_space.high
        self.middle = self.high / 2 + self.low / 2
        self.half_range = self.high / 2 - self.low / 2
        self.half_range[self.half_range == 0] = 1  # of an action that can only be one number

        s, a = keras.Input((n,)), keras.Input((m,))
        unit_a = keras.layers.Rescaling((1 / self.half_range).tolist(),
                                        (-self.middle / self.half_range).tolist())(a)
        mu = ann(n, [*settings.hidden, m], "tanh", self.rng)
        q = ann(n + m, [*settings.hidden, 1], None, self.rng)
        self.actor = keras.Model(s, keras.layers.Rescaling(
            self.half_range.tolist(), self.middle.tolist())(mu(s)))
        self.critic = keras.Model([s, a], keras.layers.Rescaling(settings.q_scale)(
            q(keras.layers.Concatenate()([s, unit_a]))))
        self.target_actor = keras.models.clone_model(self.actor)
        self.target_critic = keras.models.clone_model(self.critic)
        self.weights = self.actor.variables + self.critic.variables
        self.target_weights = self.target_actor.variables + self.target_critic.variables
        soft_update(self.target_weights, self.weights, tau=0)
        self.actor_optimizer = keras.optimizers.Adam(settings.actor_lr)
        self.critic_optimizer = keras.optimizers.Adam(settings.critic_lr)
        self.actor_optimizer.build(self.actor.trainable_variables)
        self.critic_optimizer.build(self.critic.trainable_variables)
        self.variables = [*self.weights, *self.target_weights,  # all that a checkpoint keeps
                          *self.actor_optimizer.variables, *self.critic_optimizer.variables]
        self.copy_actor(self.actor.trainable_variables)

    def critic_loss(self, s, a, r, s_next, d):
        """L = 1/N sum (y - Q(s, a))^2 with y = r + gamma (1 - d) Q'(s', mu'(s')) (section 5).

        s, s_next: (N, n); a: (N, m); r, d: (N, 1), as r of (N,) would broadcast to an (N, N) table.
        """
        q_next = self.target_critic([s_next, self.target_actor(s_next)])
        y = r + self.settings.gamma * (1 - d) * q_next
        return tf.reduce_mean((y - self.critic([s, a])) ** 2)

    def actor_loss(self, s):
        """J = -1/N sum Q(s, mu(s)) (section 6), s: (N, n). To go down it is to go up Q."""
        return -tf.reduce_mean(self.critic([s, self.actor(s)]))

    def critic_step(self, *batch):
        """One step down the critic's loss, which is returned; moves the critic alone."""
        with tf.GradientTape() as tape:
            loss = self.critic_loss(*batch)
        self.critic_optimizer.apply(tape.gradient(loss, self.critic.trainable_variables))
        return loss

    def actor_step(self, s):
        """One step down the actor's loss, which is returned; moves the actor alone."""
        with tf.GradientTape() as tape:
            loss = self.actor_loss(s)
        self.actor_optimizer.apply(tape.gradient(loss, self.actor.trainable_variables))
        return loss

    @tf.function(jit_compile=True)
    def train_block(self, batches):
        """Train on each of k batches (k, N, row). Returns if all is finite, and mu's new weights.

        A call to TensorFlow costs more than the arithmetic of networks this small, so a whole
        block of gradient steps is compiled into one call, loop and all (section 9).
        """
        losses = tf.zeros(2)  # of the last batch: what is not finite earlier stays in the weights
        for batch in batches:
            s, a, r, s_next, d = tf.split(batch, self.columns, axis=1)
            losses = tf.stack([self.critic_step(s, a, r, s_next, d), self.actor_step(s)])
            soft_update(self.target_weights, self.weights, self.settings.tau)
        finite = [tf.reduce_all(tf.math.is_finite(x)) for x in [losses, *self.weights]]
        return tf.reduce_all(finite), [tf.identity(w) for w in self.actor.trainable_variables]

    def learn(self, steps):
        """`steps` gradient steps on fresh samples. Raises FloatingPointError when they diverge."""
        batches = self.buffer.sample(self.rng, steps, self.settings.batch_size)
        finite, actor_weights = self.train_block(batches)
        if not finite:
            raise FloatingPointError("a loss or a weight is no longer finite; try lower learning "
                                     "rates, or look for huge rewards")
        self.copy_actor(actor_weights)

    def copy_actor(self, weights):
        """Copy mu to NumPy, where acting costs less than a hundredth of a call to Keras."""
        self.copies = [w.numpy() for w in weights]

    def act(self, state, noise=0.0):
        """a = mu(s) + n for one state (n,), an action (m,). Noise is in half action ranges."""
        for kernel, bias in zip(self.copies[::2], self.copies[1::2]):
            x = state @ kernel + bias
            state = np.maximum(x, 0)  # of the last layer unused: that x goes into tanh
        return self.bounded(self.middle + self.half_range * (np.tanh(x) + noise))

    def bounded(self, action):
        """`action` within its bounds, as the kind of number that the environment takes."""
        action = np.minimum(np.maximum(action, self.low), self.high)
        return (np.rint(action) if self.low.dtype.kind in "iu" else action).astype(self.low.dtype)

    def save(self, path):
        """Write all that decides the future to `path`: all or nothing, and without pickle."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, *[v.numpy() for v in self.variables], added=self.buffer.added,
                     rows=self.buffer.rows[:len(self.buffer)], history=np.array(self.history),
                     rng=json.dumps(self.rng.bit_generator.state),
                     settings=json.dumps(vars(self.settings)))
        part.replace(path)

    def restore(self, saved):
        """Become what read_checkpoint returned. Raises ValueError if it does not fit."""
        for i, variable in enumerate(self.variables):
            variable.assign(saved[f"arr_{i}"])
        self.buffer.added = int(saved["added"])
        self.buffer.rows[:len(self.buffer)] = saved["rows"]
        self.history = [(int(steps), total) for steps, total in saved["history"].tolist()]
        self.rng.bit_generator.state = json.loads(str(saved["rng"]))
        self.copy_actor(self.actor.trainable_variables)


def read_checkpoint(path):
    """What Agent.save wrote, by name. Raises ValueError if it is missing, cut short or foreign."""
    try:
        with np.load(path) as file:
            saved = {name: file[name] for name in ("rows", "added", "history", "rng", *file)}
        return saved | {"settings": vars(settings(**json.loads(str(saved["settings"]))))}
    except Exception as error:
        raise ValueError(f"--out {path.parent}: no whole checkpoint in {path.name} ({error}): "
                         "train first, or choose another folder")


def play(policy, env, seed):
    """One episode of `policy`: yields its transitions (s, a, r, s', terminated) as they happen."""
    state, over = np.array(env.reset(seed=seed)[0], np.float32), False
    while not over:
        action = policy(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        next_state = np.array(next_state, np.float32)  # a copy: some environments reuse theirs
        yield state, action, float(reward), next_state, terminated
        state, over = next_state, terminated or truncated


def train(agent, env):
    """Algorithm 1 (section 8), as a generator: at each episode's end it yields the return.

    Nothing is under way then, so a run can be saved or stopped there. Each episode's reset has a
    seed of its own, drawn from the agent's, so that a resumed run repeats it.
    """
    settings, buffer, rng = agent.settings, agent.buffer, agent.rng
    noise = Noise(len(agent.low), settings.noise, settings.noise_theta, rng)

    def explore(state):
        if buffer.added < settings.warmup:
            return agent.bounded(rng.uniform(agent.low, agent.high))
        return agent.act(state, noise.sample())

    while len(agent.history) < settings.episodes:
        noise.reset()
        total = 0.0
        for transition in play(explore, env, seed=int(rng.integers(2**31))):
            buffer.add(*transition)
            total += transition[2]
            step, block = buffer.added, settings.train_every
            if step >= settings.warmup and step % block == 0:
                # `updates` may be a fraction: steps due by now, less those due a block ago
                due = int(settings.updates * step) - int(settings.updates * (step - block))
                if due:
                    agent.learn(due)
        agent.history.append((buffer.added, total))
        yield total


def evaluate(agent, env):
    """Ten returns without noise, and pairs (Q(s, mu(s)), discounted return that followed), (k, 2).

    Where an episode is cut off, Q of its last state stands for the rest; states are left out where
    this rest would weigh half or more (section 10).
    """
    returns, pairs = [], []
    for seed in EVALUATION_SEEDS:
        states, _, rewards, next_states, terminated = zip(*play(agent.act, env, seed))
        states = tf.stack([*states, next_states[-1]])
        estimates = agent.critic([states, agent.actor(states)]).numpy()[:, 0]
        followed, rest = (0.0, 0.0) if terminated[-1] else (estimates[-1], 1.0)
        for estimate, reward in zip(estimates[-2::-1], rewards[::-1]):  # from the end backwards
            followed, rest = reward + agent.settings.gamma * followed, agent.settings.gamma * rest
            if rest < 0.5:
                pairs.append((estimate, followed))
        returns.append(sum(rewards))
    return np.array(returns), np.reshape(pairs, (-1, 2))


def plot(history, pairs):
    """The figure: training returns and their ten-episode mean; the critic's estimates and truth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    returns = [total for _, total in history]
    episodes = range(1, len(returns) + 1)
    left.plot(episodes, returns, alpha=0.4, label="episode")
    left.plot(episodes[9:], [np.mean(returns[i - 10:i]) for i in episodes[9:]], label="mean of ten")
    left.set(title="Training", xlabel="episode", ylabel="return")
    left.legend()
    right.scatter(pairs[:, 1], pairs[:, 0], s=4, alpha=0.3)
    right.axline([pairs[:, 1].mean() if len(pairs) else 0] * 2, slope=1, color="gray")
    right.set(title="The critic's honesty" if len(pairs) else "no state far from the time limit",
              xlabel="discounted return that followed", ylabel="estimate Q(s, mu(s))")
    return figure


def run(agent, env, out):
    """Train to the end or to Ctrl-C, leave the results in the folder `out`; the exit status."""
    path, pairs, status, interrupts = Path(out) / "checkpoint.npz", np.empty((0, 2)), 0, []
    agent.save(path)  # the good state to return to should the very first episodes diverge
    first, begun, saved = agent.buffer.added, time.monotonic(), time.monotonic()

    def interrupt(*_):  # the first Ctrl-C waits for the episode's end, the second does not
        interrupts.append(signal.signal(signal.SIGINT, before))

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for total in train(agent, env):
            now, (steps, returns) = time.monotonic(), zip(*agent.history)
            speed, last_ten = (steps[-1] - first) / (now - begun), np.mean(returns[-10:])
            print(f"\repisode {len(returns)}/{agent.settings.episodes}, return {total:.1f}, "
                  f"mean of last 10 {last_ten:.1f}, {speed:.0f} steps/s  ", end="", flush=True)
            if interrupts:
                raise KeyboardInterrupt
            if now > saved + SAVE_EVERY:
                agent.save(path)
                saved = now
        returns, pairs = evaluate(agent, env)
        print(f"\nmean return of {len(returns)} fresh episodes without noise: {returns.mean():.1f}")
    except KeyboardInterrupt:
        print(f"\ninterrupted: python ddpg.py --resume --out {out} goes on from here")
        status = 130
    except FloatingPointError as error:
        print(f"\nddpg.py: episode {len(agent.history) + 1} diverged: {error}", file=sys.stderr)
        agent.restore(read_checkpoint(path))
        status = 1
    finally:
        signal.signal(signal.SIGINT, before)
        agent.save(path)
        rows = [f"{i},{steps},{total}\n" for i, (steps, total) in enumerate(agent.history, 1)]
        path.with_name("returns.csv").write_text("".join(["episode,steps,return\n", *rows]))
        agent.actor.save(path.with_name("actor.keras"))
        plot(agent.history, pairs).savefig(path.with_name("returns.png"))
    return status


def has_display():
    return sys.platform != "linux" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def watch(out, env_id, gif):
    """Play the actor saved in `out`: ten episodes in a window, or one into policy.gif."""
    if not gif and not has_display():
        raise ValueError("there is no display; --gif needs none")
    actor = keras.models.load_model(out / "actor.keras")
    env = gym.make(env_id, render_mode="rgb_array" if gif else "human")
    env = gym.wrappers.RenderCollection(env) if gif else env
    low, high = env.action_space.low, env.action_space.high
    for seed in EVALUATION_SEEDS[:1 if gif else 10]:
        episode = play(lambda s: np.clip(actor(s[None])[0], low, high), env, seed)
        print(f"return {sum(reward for _, _, reward, _, _ in episode):.1f}")
    if gif:
        first, *others = [Image.fromarray(frame).reduce(2) for frame in env.render()]
        first.save(out / "policy.gif", save_all=True, append_images=others, loop=0,
                   duration=1000 / env.metadata.get("render_fps", 30))
    env.close()


def main(arguments=None):
    """The command line. Returns 0, 1 (diverged), 2 (bad input) or 130 (interrupted)."""
    parser = Parser()
    parser.add_argument("--out", type=Path, help="results folder (default: runs/<env>-seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--watch", action="store_true", help="play the actor in --out in a window")
    parser.add_argument("--gif", action="store_true", help="play it once into policy.gif instead")
    try:
        chosen = parser.parse_args(arguments)
        out = chosen.out or Path(f"runs/{chosen.env}-seed{chosen.seed}")
        path, old_run = out / "checkpoint.npz", chosen.resume or chosen.watch or chosen.gif
        saved = read_checkpoint(path) if old_run or path.exists() else None
        if old_run:
            parser.set_defaults(**saved["settings"])
            chosen = parser.parse_args(arguments)
            for name, kept in saved["settings"].items():
                value = getattr(chosen, name)
                if value != kept and not (name == "episodes" and value > kept):
                    raise ValueError(f"--{name.replace('_', '-')} {value} contradicts {kept} in "
                                     f"{path}: leave it out, or choose another --out")
        elif saved and len(saved["history"]) < saved["settings"]["episodes"]:
            raise ValueError(f"--out {out} holds an unfinished run: --resume goes on with it; or "
                             "choose another folder")
        if chosen.watch or chosen.gif:
            try:
                watch(out, chosen.env, chosen.gif)
            except Exception as error:
                option = "--gif" if chosen.gif else "--watch"
                raise ValueError(f"{option} cannot show {chosen.env}: {error}")
            return 0
        if max(chosen.hidden, default=0) < 128:  # for networks this small, one is faster than two
            tf.config.threading.set_intra_op_parallelism_threads(1)
        resume = chosen.resume
        for name in ("out", "resume", "watch", "gif"):
            delattr(chosen, name)
        env = gym.make(chosen.env)
        agent = Agent(env, chosen)
        if resume:
            agent.restore(saved)
        elif saved:
            print(f"replacing the finished run in {out}")
        agent.save(path)
    except (gym.error.Error, ImportError) as error:
        problem = f"--env {chosen.env}: {error}: choose one that is installed"
    except OSError as error:
        problem = f"--out {out}: {error.strerror}: choose a folder that can be written"
    except (ValueError, MemoryError) as error:
        problem = str(error)
    else:
        return run(agent, env, out)
    print("ddpg.py:", " ".join(problem.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    if status == 0 and has_display() and plt.get_backend().lower() != "agg":
        plt.show()
    sys.exit(status)
