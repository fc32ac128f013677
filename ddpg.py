"""Deep Deterministic Policy Gradient (DDPG) in one file, to be read top to bottom beside its theory.

An actor mu maps a state s to an action a; a critic Q estimates the return that follows the pair.
The critic learns from replayed transitions, the actor climbs the critic's slope, and slow copies of
both, the targets mu' and Q', keep the critic from chasing its own estimates. Algorithm 1 of
Lillicrap et al. 2015 (arXiv:1509.02971) is the map of this file; sections are those of README.md:

    networks mu, Q, mu', Q'                   ann, Agent           section 2
    exploration a = mu(s) + n                 Noise                section 3
    replay memory of (s, a, r, s', d)         ReplayBuffer         section 4
    the critic's loss, the actor's loss       Agent.critic_loss, Agent.actor_loss    5 and 6
    theta' <- tau theta' + (1 - tau) theta    soft_update          section 7
    for each episode, for each step           train                section 8

`python ddpg.py` teaches a pendulum to stand up; `python ddpg.py --help` lists every setting.
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
stderr = os.dup(2)
with open(os.devnull, "w") as null:
    os.dup2(null.fileno(), 2)  # TensorFlow's first lines come from C++ and heed no log level
try:
    import keras
    import tensorflow as tf
finally:
    os.dup2(stderr, 2)
    os.close(stderr)


def setting(default, meaning, low=-np.inf, high=np.inf):
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """All that decides a run. Raises ValueError naming the option whose value is out of range."""

    env: str = setting("Pendulum-v1", "Gymnasium environment; module:Name-v0 for one of your own")
    episodes: int = setting(100, "episodes to train", 1)
    seed: int = setting(0, "source of all randomness", 0)
    hidden: tuple = setting((64, 64), "hidden layer sizes of both networks", 1)
    actor_lr: float = setting(1e-3, "learning rate of the actor", 0)
    critic_lr: float = setting(1e-3, "learning rate of the critic", 0)
    gamma: float = setting(0.99, "discount per step", 0, 1)
    tau: float = setting(0.99, "what a target keeps of itself; 1 minus the paper's tau", 0, 1)
    q_scale: float = setting(10.0, "unit of the critic's output; about 10 rewards", 0)
    noise: float = setting(0.1, "sigma of the noise, in half action ranges", 0)
    noise_theta: float = setting(1.0, "noise: 1 is white, 0.15 Ornstein-Uhlenbeck", 0, 1)
    batch_size: int = setting(64, "transitions in a batch, N", 1)
    buffer_size: int = setting(100_000, "transitions remembered", 1)
    warmup: int = setting(200, "first steps, of random actions and no training", 1)
    train_every: int = setting(50, "environment steps in a block; the paper's is 1", 1)
    updates: float = setting(1.0, "gradient steps per environment step", 0)

    def __post_init__(self):
        for f in fields(self):
            value, (_, low, high) = getattr(self, f.name), f.metadata.values()
            if f.type is not str and not all(low <= x <= high and x < np.inf for x in np.ravel(value)):
                remedy = f"{low} or more" if high == np.inf else f"a number from {low} to {high}"
                raise ValueError(f"{flag(f.name)} {value} is out of range: choose {remedy}")
        for name in ("buffer_size", "warmup"):
            if self.batch_size > getattr(self, name):
                raise ValueError(f"--batch-size {self.batch_size} is more than {flag(name)} "
                                 f"{getattr(self, name)}: lower the one or raise the other")


def flag(name):
    return "--" + name.replace("_", "-")


def ann(input_size, layer_sizes, output_activation, rng):
    """A network (batch, input_size) -> (batch, layer_sizes[-1]), its hidden layers relu (section 2).

    The actor's output activation is "tanh"; the critic's is None, linear. `rng` seeds the weights.
    """
    network = keras.Sequential([keras.Input((input_size,))])
    for size, activation in zip(layer_sizes, ["relu"] * (len(layer_sizes) - 1) + [output_activation]):
        initializer = keras.initializers.GlorotUniform(seed=int(rng.integers(2**31)))
        network.add(keras.layers.Dense(size, activation, kernel_initializer=initializer))
    return network


class ReplayBuffer:
    """The last `capacity` transitions (section 4), a float32 row each: s, a, r, s', d.

    d is 1 where the episode terminated in s', 0 where it went on or was cut off by a time limit.
    """

    def __init__(self, capacity, state_size, action_size):
        self.rows = np.zeros((capacity, 2 * state_size + action_size + 2), np.float32)
        self.added = 0  # since the beginning, so it also counts the environment's steps

    def __len__(self):
        return min(self.added, len(self.rows))

    def add(self, state, action, reward, next_state, terminated):
        self.rows[self.added % len(self.rows)] = [*state, *action, reward, *next_state, terminated]
        self.added += 1

    def sample(self, rng, *shape):
        """Rows drawn uniformly with replacement, shape + (row,): a batch, or a stack of batches."""
        return self.rows[rng.integers(len(self), size=shape)]


class Noise:
    """n <- (1 - theta) n + sigma N(0, I), added to actions from outside the policy (section 3).

    White Gaussian noise at theta = 1, as in the notes; Ornstein-Uhlenbeck at 0.15, as in the paper.
    """

    def __init__(self, size, sigma, theta, rng):
        self.size, self.sigma, self.theta, self.rng = size, sigma, theta, rng
        self.reset()

    def reset(self):
        self.n = np.zeros(self.size)

    def sample(self):
        self.n = (1 - self.theta) * self.n + self.sigma * self.rng.standard_normal(self.size)
        return self.n


def soft_update(targets, sources, tau):
    """theta' <- tau theta' + (1 - tau) theta (section 7). tau near 1: the targets follow slowly."""
    for target, source in zip(targets, sources):
        target.assign(tau * target + (1 - tau) * source)


class Agent:
    """Four networks, their optimizers, the memory, and the history [(steps so far, return), ...].

    Works for any `env` with one-dimensional Box observations (n,) and bounded Box actions (m,), in
    the environment's own units throughout; other spaces raise ValueError.
    """

    def __init__(self, env, settings=Settings()):
        for space, needs_bounds in ((env.observation_space, False), (env.action_space, True)):
            if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1
                    and (space.is_bounded() or not needs_bounds)):
                raise ValueError(f"environment {env.unwrapped}: {space} is not a one-dimensional Box"
                                 + needs_bounds * " with finite bounds" + ": wrap or replace it")
        (n,), (m,) = env.observation_space.shape, env.action_space.shape
        self.low, self.high = env.action_space.low, env.action_space.high
        self.middle, self.half_range = (self.high + self.low) / 2, (self.high - self.low) / 2
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)
        self.buffer, self.history = ReplayBuffer(settings.buffer_size, n, m), []
        self.columns = [n, m, 1, n, 1]  # of a row of the buffer: s, a, r, s', d

        s, a = keras.Input((n,)), keras.Input((m,))
        to_units = keras.layers.Rescaling(self.half_range.tolist(), self.middle.tolist())
        from_units = keras.layers.Rescaling((1 / self.half_range).tolist(),
                                            (-self.middle / self.half_range).tolist())
        self.actor = keras.Model(s, to_units(ann(n, (*settings.hidden, m), "tanh", self.rng)(s)))
        q = ann(n + m, (*settings.hidden, 1), None, self.rng)
        self.critic = keras.Model([s, a], keras.layers.Rescaling(settings.q_scale)(
            q(keras.layers.Concatenate()([s, from_units(a)]))))
        self.target_actor, self.target_critic = map(keras.models.clone_model, (self.actor, self.critic))
        self.weights = self.actor.variables + self.critic.variables
        self.target_weights = self.target_actor.variables + self.target_critic.variables
        soft_update(self.target_weights, self.weights, tau=0)
        self.actor_optimizer = keras.optimizers.Adam(settings.actor_lr)
        self.critic_optimizer = keras.optimizers.Adam(settings.critic_lr)
        self.actor_optimizer.build(self.actor.trainable_variables)
        self.critic_optimizer.build(self.critic.trainable_variables)
        self.refresh()

    def critic_loss(self, s, a, r, s_next, d):
        """L = 1/N sum (y - Q(s, a))^2, y = r + gamma (1 - d) Q'(s', mu'(s')) (section 5).

        Shapes (N, n), (N, m), (N, 1), (N, n), (N, 1). Were r (N,), the difference would broadcast
        to an (N, N) table without a word.
        """
        q_next = self.target_critic([s_next, self.target_actor(s_next)])
        y = r + self.settings.gamma * (1 - d) * q_next
        return tf.reduce_mean((y - self.critic([s, a])) ** 2)

    def actor_loss(self, s):
        """J = -1/N sum Q(s, mu(s)) (section 6): going down it goes up Q. s: (N, n)."""
        return -tf.reduce_mean(self.critic([s, self.actor(s)]))

    def critic_step(self, *batch):
        """One step of the critic, alone, down its loss, which is returned."""
        with tf.GradientTape() as tape:
            loss = self.critic_loss(*batch)
        self.critic_optimizer.apply(tape.gradient(loss, self.critic.trainable_variables))
        return loss

    def actor_step(self, s):
        """One step of the actor, alone, down its loss, which is returned."""
        with tf.GradientTape() as tape:
            loss = self.actor_loss(s)
        self.actor_optimizer.apply(tape.gradient(loss, self.actor.trainable_variables))
        return loss

    @tf.function(jit_compile=True)
    def train_block(self, batches):
        """Train on each of the `batches` (k, N, row) in turn; return whether all is still finite.

        A call to TensorFlow costs more than these networks' arithmetic, so a whole block of
        gradient steps is compiled into one (section 9).
        """
        losses = tf.zeros(2)
        for batch in batches:
            s, a, r, s_next, d = tf.split(batch, self.columns, axis=1)
            losses = tf.stack([self.critic_step(s, a, r, s_next, d), self.actor_step(s)])
            soft_update(self.target_weights, self.weights, self.settings.tau)
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(x)) for x in [losses, *self.weights]])

    def learn(self, steps):
        """Sample and train `steps` batches. FloatingPointError if a loss or weight overflows."""
        if not self.train_block(self.buffer.sample(self.rng, steps, self.settings.batch_size)):
            raise FloatingPointError(f"episode {len(self.history) + 1} diverged: a loss or weight is "
                                     "not finite. Try lower learning rates, or look at the rewards")
        self.refresh()

    def refresh(self):
        """Copy the actor to NumPy, where acting costs a hundredth of a call to Keras."""
        weights = [w.numpy() for w in self.actor.trainable_variables]
        self.layers = list(zip(weights[::2], weights[1::2]))

    def act(self, state, noise=0.0):
        """a = mu(s) + n for a state (n,): an action (m,) within bounds. Noise is in half ranges."""
        for weights, bias in self.layers:
            x = state @ weights + bias
            state = np.maximum(x, 0)
        action = self.middle + self.half_range * (np.tanh(x) + noise)
        return np.clip(action, self.low, self.high).astype(self.low.dtype)

    def variables(self):
        return (self.weights + self.target_weights
                + self.actor_optimizer.variables + self.critic_optimizer.variables)

    def save(self, path):
        """Write all that decides the future to `path`, whole or not at all, without pickle."""
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, *[v.numpy() for v in self.variables()], added=self.buffer.added,
                     rows=self.buffer.rows[:len(self.buffer)], history=np.array(self.history),
                     rng=json.dumps(self.rng.bit_generator.state),
                     settings=json.dumps(asdict(self.settings)))
        part.replace(path)

    def restore(self, checkpoint):
        """Become what `checkpoint`, from read_checkpoint, holds. ValueError if shapes differ."""
        for i, variable in enumerate(self.variables()):
            variable.assign(checkpoint[f"arr_{i}"])
        self.buffer.added = int(checkpoint["added"])
        self.buffer.rows[:len(self.buffer)] = checkpoint["rows"]
        self.history = [(int(steps), total) for steps, total in checkpoint["history"].tolist()]
        self.rng.bit_generator.state = json.loads(str(checkpoint["rng"]))
        self.refresh()


def read_checkpoint(path):
    """What Agent.save wrote, by name, with Settings restored. ValueError if it is anything else."""
    try:
        with np.load(path) as file:
            checkpoint = dict(file)
        return {**checkpoint, "settings": Settings(**json.loads(str(checkpoint["settings"])))}
    except Exception as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}: choose another --out")


def play(policy, env, seed):
    """One episode of `policy`, step by step: yields its transitions (s, a, r, s', terminated)."""
    state, over = np.array(env.reset(seed=seed)[0], np.float32), False
    while not over:
        action = policy(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        next_state = np.array(next_state, np.float32)  # a copy: some environments reuse theirs
        yield state, action, float(reward), next_state, terminated
        state, over = next_state, terminated or truncated


def train(agent, env):
    """Algorithm 1 (section 8), as a generator that yields each episode's return at its end.

    Nothing is under way then, so a run can be saved or stopped there. Each episode is reset with a
    seed of its own, drawn from the agent's, so that a resumed run repeats it.
    """
    c, buffer, rng = agent.settings, agent.buffer, agent.rng
    noise = Noise(len(agent.low), c.noise, c.noise_theta, rng)

    def explore(state):
        if buffer.added < c.warmup:
            return rng.uniform(agent.low, agent.high).astype(agent.low.dtype)
        return agent.act(state, noise.sample())

    while len(agent.history) < c.episodes:
        total = 0.0
        noise.reset()
        for s, a, r, s_next, terminated in play(explore, env, seed=int(rng.integers(2**31))):
            buffer.add(s, a, r, s_next, terminated)  # not truncated: what is cut off still has value
            total += r
            if buffer.added >= c.warmup and buffer.added % c.train_every == 0:
                before = buffer.added - c.train_every
                agent.learn(int(c.updates * buffer.added) - int(c.updates * before))
        agent.history.append((buffer.added, total))
        yield total


def evaluation_seeds(settings, episodes):
    return np.random.default_rng([settings.seed, 1]).integers(2**31, size=episodes).tolist()


def evaluate(agent, env, episodes=10):
    """Returns (episodes,) without noise, and rows (Q(s, mu(s)), discounted return that followed).

    Where an episode is cut off, Q of its last state stands for the rest (section 10); only states
    are kept after which that rest weighs less than the rewards that were seen.
    """
    returns, pairs = [], []
    for seed in evaluation_seeds(agent.settings, episodes):
        states, _, rewards, next_states, terminated = zip(*play(agent.act, env, seed))
        states = tf.stack([*states, next_states[-1]])
        estimates = agent.critic([states, agent.actor(states)]).numpy()[:, 0]
        followed, rest = (0.0, 0.0) if terminated[-1] else (estimates[-1], 1.0)
        for estimate, reward in zip(estimates[-2::-1], rewards[::-1]):
            followed, rest = reward + agent.settings.gamma * followed, agent.settings.gamma * rest
            if rest < 0.5:
                pairs.append((estimate, followed))
        returns.append(sum(rewards))
    return np.array(returns), np.reshape(pairs, (-1, 2))


def plot(history, pairs):
    """The figure: training returns with their ten-episode mean, and the critic's honesty."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    returns = np.array([total for _, total in history])
    episodes = np.arange(1, len(returns) + 1)
    left.plot(episodes, returns, alpha=0.4, label="each episode")
    left.plot(episodes[9:], [returns[i - 10:i].mean() for i in episodes[9:]], label="mean of ten")
    left.set(title="Training", xlabel="episode", ylabel="return")
    left.legend()
    right.scatter(pairs[:, 1], pairs[:, 0], s=4, alpha=0.3)
    right.axline((pairs.mean() if len(pairs) else 0,) * 2, slope=1, color="gray")
    right.set(title="The critic's honesty", xlabel="discounted return that followed",
              ylabel="estimate Q(s, mu(s))")
    return figure


def run(agent, env, out):
    """Train to the end or to Ctrl-C, and leave all results in the folder `out`. The exit status."""
    checkpoint, pairs, status, interrupts = out / "checkpoint.npz", np.empty((0, 2)), 0, []
    first, begun, saved = agent.buffer.added, time.monotonic(), time.monotonic()
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(  # a second Ctrl-C does not wait
        signal.signal(signal.SIGINT, signal.default_int_handler)))
    try:
        for total in train(agent, env):
            now, (steps, totals) = time.monotonic(), zip(*agent.history)
            print(f"\repisode {len(totals)}/{agent.settings.episodes}, return {total:.1f}, mean of "
                  f"last 10 {np.mean(totals[-10:]):.1f}, {(steps[-1] - first) / (now - begun):.0f} "
                  "steps/s  ", end="", flush=True)
            if interrupts:
                raise KeyboardInterrupt
            if now > saved + 20:
                agent.save(checkpoint)
                saved = now
        returns, pairs = evaluate(agent, env)
        print(f"\nmean return of {len(returns)} fresh episodes without noise: {returns.mean():.1f}")
    except KeyboardInterrupt:
        print(f"\ninterrupted: python ddpg.py --resume --out {out} goes on from here")
        status = 130
    except FloatingPointError as error:
        agent.restore(read_checkpoint(checkpoint))
        print(f"\nddpg.py: {error}", file=sys.stderr)
        status = 1
    finally:
        agent.save(checkpoint)
        rows = [f"{i},{steps},{total}\n" for i, (steps, total) in enumerate(agent.history, 1)]
        (out / "returns.csv").write_text("".join(["episode,steps,return\n", *rows]))
        agent.actor.save(out / "actor.keras")
        plot(agent.history, pairs).savefig(out / "returns.png")
    return status


def watch(out, settings, gif):
    """Play the saved actor without noise: in a window, or one episode into policy.gif."""
    actor = keras.models.load_model(out / "actor.keras")
    env = make(settings.env, render_mode="rgb_array" if gif else "human")
    env = gym.wrappers.RenderCollection(env) if gif else env
    low, high = env.action_space.low, env.action_space.high
    for seed in evaluation_seeds(settings, 1 if gif else 10):
        steps = play(lambda s: np.clip(actor(s[None])[0], low, high), env, seed)
        print(f"return {sum(reward for _, _, reward, _, _ in steps):.1f}")
    if gif:
        first, *others = [Image.fromarray(frame).reduce(2) for frame in env.render()]
        first.save(out / "policy.gif", save_all=True, append_images=others, loop=0,
                   duration=1000 / env.metadata.get("render_fps", 30))
    env.close()


def make(name, **options):
    """gymnasium.make, with a ValueError that names --env."""
    try:
        return gym.make(name, **options)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"--env {name}: {error} (python -m pip list shows what is installed)")


def fail(message):
    print("ddpg.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parse(arguments):
    """The options that were given, by name, and no others."""
    parser = argparse.ArgumentParser(description="DDPG in TensorFlow 2: train, resume or watch.",
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in fields(Settings):
        many = {"nargs": "+", "type": int} if f.type is tuple else {"type": f.type}
        shown = " ".join(map(str, np.ravel(f.default)))
        parser.add_argument(flag(f.name), **many, metavar="X",
                            help=f"{f.metadata['meaning']} (default: {shown})")
    parser.add_argument("--out", type=Path, help="results folder (default: runs/<env>-seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--watch", action="store_true", help="play the actor in --out in a window")
    parser.add_argument("--gif", action="store_true", help="play it once into policy.gif instead")
    return vars(parser.parse_args(arguments))


def main(arguments=None):
    """The command line. Returns 0, 1 (diverged) or 130 (interrupted); bad input exits with 2."""
    given = parse(arguments)
    resume, play_only, gif = (given.pop(name, False) for name in ("resume", "watch", "gif"))
    default = f"runs/{given.get('env', Settings.env)}-seed{given.get('seed', Settings.seed)}"
    out = given.pop("out", Path(default))
    path = out / "checkpoint.npz"
    tf.config.threading.set_intra_op_parallelism_threads(1)  # faster than two for small networks
    tf.config.threading.set_inter_op_parallelism_threads(1)
    try:
        if resume or play_only or gif:
            checkpoint = read_checkpoint(path)
            settings = checkpoint["settings"]
            for name, value in given.items():
                saved = getattr(settings, name)
                if value != saved and not (name == "episodes" and value > saved):
                    raise ValueError(f"{flag(name)} {value} contradicts {saved} in {path}: leave it "
                                     "out, or choose another --out")
            settings = replace(settings, **given)
        else:
            settings = Settings(**given)
            if path.exists():
                old = read_checkpoint(path)
                if len(old["history"]) < old["settings"].episodes:
                    raise ValueError(f"--out {out} holds an unfinished run: add --resume to go on "
                                     "with it, or choose another folder")
                print(f"replacing the finished run in {out}")
        if play_only or gif:
            watch(out, settings, gif)
            return 0
        env = make(settings.env)
        agent = Agent(env, settings)
        if resume:
            agent.restore(checkpoint)
        out.mkdir(parents=True, exist_ok=True)
        agent.save(path)
    except (ValueError, MemoryError) as error:
        fail(error)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}: choose a folder that can be written")
    return run(agent, env, out)


if __name__ == "__main__":
    status = main()
    if status == 0 and plt.get_backend().lower() != "agg":
        plt.show()
    sys.exit(status)
