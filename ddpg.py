"""Deep Deterministic Policy Gradient (DDPG) in one file, to be read beside its theory.

An actor mu maps a state s to an action a; a critic Q estimates the return that follows (s, a).
The critic learns from replayed transitions, the actor climbs the critic's slope, and slow copies of
both, the targets mu' and Q', keep the critic from chasing its own estimates. Algorithm 1 of
Lillicrap et al. 2015 (arXiv:1509.02971), piece by piece, and README.md's section on each:

    networks mu and Q, targets mu' and Q'       ann, Agent           section 2
    memory of transitions (s, a, r, s', d)      ReplayBuffer         section 4
    theta' <- tau theta' + (1 - tau) theta      soft_update          section 7
    critic's loss (y - Q(s, a))^2               Agent.critic_loss    section 5
    actor's loss -Q(s, mu(s))                   Agent.actor_loss     section 6
    gradient steps, a block of them in a call   Agent.train_block    section 9
    episodes of steps a = mu(s) + n             play, train          sections 3, 8

`python ddpg.py` teaches a pendulum to stand up; `python ddpg.py --help` lists every setting.
"""

import argparse
import copy
import json
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}  # not JAX; no chatter
real_stderr = os.dup(2)  # no setting silences all that TensorFlow prints while it loads
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import keras
    import tensorflow as tf
finally:
    os.dup2(real_stderr, 2)

SETTINGS = {  # name: default, least, most, meaning
    "env": ("Pendulum-v1", None, None, "Gymnasium environment; module:Name-v0 for your own"),
    "episodes": (100, 1, 10**9, "episodes to train"),
    "seed": (0, 0, 2**31 - 1, "source of all randomness"),
    "hidden": ([64, 64, 64], 1, 10**5, "hidden layer sizes of both networks"),
    "actor_lr": (1e-3, 0, 1, "learning rate of the actor"),
    "critic_lr": (2e-3, 0, 1, "learning rate of the critic"),
    "gamma": (0.995, 0, 1, "discount per step"),
    "tau": (0.98, 0, 1, "share of itself that a target keeps; the paper's tau is 1 - this"),
    "noise": (0.25, 0, 10, "sigma of the exploration noise; 1 is half an action's range"),
    "noise_theta": (1.0, 0, 1, "1: white noise; 0.15: Ornstein-Uhlenbeck, the paper's"),
    "batch_size": (128, 1, 10**6, "transitions in a batch, N"),
    "buffer_size": (100_000, 1, 10**8, "transitions remembered"),
    "warmup": (200, 1, 10**9, "environment steps before training, with random actions"),
    "train_every": (50, 1, 10**6, "environment steps between trainings; the paper's is 1"),
    "updates": (1.0, 0, 1000, "gradient steps per environment step"),
}
EVALUATION_SEEDS = range(1_000_000, 1_000_010)  # the same ten starts for every run
SAVE_EVERY = 20  # seconds between checkpoints


def flag(name):
    return "--" + name.replace("_", "-")


def settings(**changes):
    """A namespace: the defaults with `changes`. ValueError if out of range, KeyError if unknown."""
    for name, value in changes.items():
        _, least, most, _ = SETTINGS[name]
        if name != "env" and not all(least <= number <= most for number in np.ravel(value)):
            raise ValueError(f"{flag(name)} {value} is out of range: choose {least} to {most}")
    chosen = argparse.Namespace(**({name: row[0] for name, row in SETTINGS.items()} | changes))
    if chosen.batch_size > min(chosen.warmup, chosen.buffer_size):
        raise ValueError(f"--batch-size {chosen.batch_size} is more than --warmup {chosen.warmup} "
                         f"or --buffer-size {chosen.buffer_size}: lower it or raise these")
    return chosen


def ann(input_size, layer_sizes, output_activation):
    """A network (N, input_size) -> (N, layer_sizes[-1]), its hidden layers relu (section 2)."""
    *hidden, last = layer_sizes
    # an actor starts near 0, where tanh has a slope; if a critic did, low first returns would push
    # nearly all its last weights below 0, and it could end flat where it is highest (section 2)
    limit = 3e-3 if output_activation == "tanh" else 1.0
    last_weights = keras.initializers.RandomUniform(-limit, limit)
    return keras.Sequential([
        keras.Input((input_size,)), *[keras.layers.Dense(size, "relu") for size in hidden],
        keras.layers.Dense(last, kernel_initializer=last_weights),
        keras.layers.Activation(output_activation)])  # apart: actor_loss needs what goes into tanh


class ReplayBuffer:
    """The last `capacity` transitions, a float32 row each: s, a, r, s', d (section 4).

    d is 1 where the episode terminated in s', 0 where it went on or was cut off by a time limit.
    """

    def __init__(self, capacity, state_size, action_size):
        self.columns = [state_size, action_size, 1, state_size, 1]  # widths of s, a, r, s', d
        self.rows = np.zeros((capacity, sum(self.columns)), np.float32)
        self.added = 0  # since the beginning, so this also counts the environment's steps

    def add(self, s, a, r, s_next, d):
        row = np.concatenate([s, a, [r], s_next, [d]], dtype=np.float32)
        if not np.isfinite(row).all():
            raise FloatingPointError("the environment gave a state or reward that is not finite")
        self.rows[self.added % len(self.rows)] = row
        self.added += 1

    def sample(self, rng, *shape):
        """Rows drawn uniformly with replacement: with shape k, N it is k batches, (k, N, row)."""
        filled = min(self.added, len(self.rows))
        return self.rows.take(rng.integers(filled, size=shape), axis=0)


def descend(network, loss, *batch):
    """One step of network.optimizer down loss(*batch), moving `network` alone. Returns the loss."""
    with tf.GradientTape() as tape:
        value = loss(*batch)
    network.optimizer.apply(tape.gradient(value, network.trainable_variables))
    return value


def soft_update(target, network, tau):
    """theta' <- tau theta' + (1 - tau) theta (section 7). tau near 1: the target follows slowly."""
    for slow, fast in zip(target.variables, network.variables):
        slow.assign(tau * slow + (1 - tau) * fast)


class Agent:
    """The networks, their optimizers, the memory, and the history [[steps so far, return], ...].

    Learns in any `env` whose observations and bounded actions are each a Box of one dimension;
    ValueError for others. All actions are in [-1, 1] (section 2), except those of `policy`, a
    Keras model (N, state_size) -> (N, action_size): they are in the environment's own units.
    """

    def __init__(self, env, settings):
        states, actions = env.observation_space, env.action_space
        boxes = [isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (states, actions)]
        if not (all(boxes) and actions.is_bounded()):
            raise ValueError(f"observations {states} and actions {actions} must each be a Box of "
                             "one dimension, that of the actions bounded: wrap the environment")
        (state_size,), (action_size,) = states.shape, actions.shape
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)
        self.buffer, self.history = ReplayBuffer(settings.buffer_size, state_size, action_size), []
        keras.utils.set_random_seed(settings.seed)  # for the first weights
        self.actor = ann(state_size, [*settings.hidden, action_size], "tanh")
        self.critic = ann(state_size + action_size, [*settings.hidden, 1], "linear")
        self.before_tanh = keras.Sequential(self.actor.layers[:-1])  # shared layers, no tanh
        self.target_actor, self.target_critic = copy.deepcopy((self.actor, self.critic))
        self.average_actor = copy.deepcopy(self.actor)  # the final policy (section 7)
        for network, rate in (self.actor, settings.actor_lr), (self.critic, settings.critic_lr):
            network.optimizer = keras.optimizers.Adam(rate)
            network.optimizer.build(network.variables)  # train_block and restore need its variables
        low, high = actions.low.astype(float), actions.high.astype(float)
        self.policy = keras.Sequential([
            self.average_actor, keras.layers.Rescaling((high - low) / 2, (high + low) / 2)])
        self.variables = [variable for part in (
            self.actor, self.critic, self.target_actor, self.target_critic, self.average_actor,
            self.actor.optimizer, self.critic.optimizer) for variable in part.variables]

    def critic_loss(self, s, a, r, s_next, d):
        """L = 1/N sum (y - Q(s, a))^2 with y = r + gamma (1 - d) Q'(s', mu'(s')) (section 5).

        s, s_next: (N, state_size); a: (N, action_size); r, d: (N, 1), as (N,) would make it (N, N).
        """
        q_next = self.target_critic(tf.concat([s_next, self.target_actor(s_next)], axis=1))
        y = r + self.settings.gamma * (1 - d) * q_next
        return tf.reduce_mean((y - self.critic(tf.concat([s, a], axis=1))) ** 2)

    def actor_loss(self, s):
        """J + toll with J = -1/N sum Q(s, mu(s)), s: (N, state_size) (section 6)."""
        x = self.before_tanh(s)
        toll = tf.reduce_mean(tf.nn.relu(tf.abs(x) - 5) ** 2)  # there tanh has hardly any slope
        return toll - tf.reduce_mean(self.critic(tf.concat([s, tf.tanh(x)], axis=1)))

    @tf.function(jit_compile=True)  # one call a block, as a call costs more than a step (section 9)
    def train_block(self, batches):
        """Train on each of k batches (k, N, row). Returns whether losses and weights are finite."""
        total = 0.0  # the sum of all losses: finite only if each of them is
        for batch in batches:
            s, a, r, s_next, d = tf.split(batch, self.buffer.columns, axis=1)
            total += descend(self.critic, self.critic_loss, s, a, r, s_next, d)
            total += descend(self.actor, self.actor_loss, s)
            soft_update(self.target_actor, self.actor, self.settings.tau)
            soft_update(self.target_critic, self.critic, self.settings.tau)
            t = tf.cast(self.actor.optimizer.iterations, tf.float32)  # gradient steps so far
            soft_update(self.average_actor, self.actor, t / (t + 4))  # over the last quarter or so
        weights = self.actor.variables + self.critic.variables
        return tf.math.is_finite(tf.add_n([total, *map(tf.reduce_sum, weights)]))

    def save(self, path):
        """Write to `path` all that further training needs: whole or not at all, without pickle."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")  # savez appends .npz to any other name
        rest = {"settings": vars(self.settings), "rng": self.rng.bit_generator.state,
                "added": self.buffer.added, "history": self.history}
        np.savez(part, *[variable.numpy() for variable in self.variables],
                 rows=self.buffer.rows[:self.buffer.added], rest=json.dumps(rest))
        part.replace(path)

    def restore(self, saved):
        """Become the agent that was saved. ValueError if its environment had other sizes."""
        self.buffer.rows[:len(saved["rows"])] = saved["rows"]  # first: the shortest error message
        for i, variable in enumerate(self.variables):
            variable.assign(saved[f"arr_{i}"])  # numpy.savez calls arrays without a name arr_0, ...
        self.buffer.added, self.history = saved["added"], saved["history"]
        self.rng.bit_generator.state = saved["rng"]


def read_checkpoint(path):
    """What Agent.save wrote, as a dict. A damaged file raises what numpy.load raises."""
    with np.load(path) as file:
        return {**file, **json.loads(str(file["rest"]))}


def mu(weights, s):
    """mu(s) of one s, (state_size,) -> (action_size,), 100 times faster than Keras (section 9)."""
    for kernel, bias in zip(weights[::2], weights[1::2]):
        x = s @ kernel + bias
        s = np.maximum(x, 0)  # now the next layer's input; after the last layer, tanh is due
    return np.tanh(x)


def play(act, env, seed):
    """One episode of a = act(s) in [-1, 1]: yields each (s, a, r, s', terminated) as it happens."""
    space = env.action_space  # each a becomes an action in its bounds, of its dtype
    low, high = space.low.astype(float), space.high.astype(float)
    state, over = np.array(env.reset(seed=seed)[0], np.float32), False  # a copy: envs may reuse it
    while not over:
        a = act(state)
        action = np.clip((high + low) / 2 + (high - low) / 2 * a, low, high)
        action = action if space.dtype.kind == "f" else np.rint(action)
        next_state, reward, terminated, truncated, _ = env.step(action.astype(space.dtype))
        next_state = np.array(next_state, np.float32)
        yield state, a, float(np.squeeze(reward)), next_state, bool(terminated)
        state, over = next_state, terminated or truncated


def train(agent, env):
    """Algorithm 1 (section 8): yields the return at each episode's end, where a run can be saved.

    Raises FloatingPointError if training diverges.
    """
    settings, buffer, rng = agent.settings, agent.buffer, agent.rng
    block, weights = settings.train_every, agent.actor.get_weights()
    while len(agent.history) < settings.episodes:
        n, total = np.zeros(env.action_space.shape), 0.0

        def explore(s):  # n <- (1 - theta) n + sigma N(0, I); `weights` change after each block
            if buffer.added < settings.warmup:
                return rng.uniform(-1, 1, n.shape)
            n[:] = (1 - settings.noise_theta) * n + settings.noise * rng.standard_normal(n.shape)
            return np.clip(mu(weights, s) + n, -1, 1)

        for s, a, r, s_next, d in play(explore, env, seed=int(rng.integers(2**31))):
            buffer.add(s, a, r, s_next, d)
            step, total = buffer.added, total + r
            if step >= settings.warmup and step % block == 0:
                # gradient steps due by now, less those due a block ago: `updates` may be a fraction
                k = int(settings.updates * step) - int(settings.updates * (step - block))
                if k and not agent.train_block(buffer.sample(rng, k, settings.batch_size)):
                    raise FloatingPointError("a loss or a weight is no longer finite: check the "
                                             "rewards, try lower learning rates in a new --out")
                weights = agent.actor.get_weights()
        agent.history.append([buffer.added, total])
        yield total


def evaluate(agent, env):
    """Ten episodes of the final policy mu; yields for each its return and pairs Q(s, mu(s)), truth.

    The truth is the discounted return that followed. Where an episode is cut off, Q of its last
    state stands for the rest; states where it would weigh half or more are left out (section 10).
    """
    weights, gamma = agent.average_actor.get_weights(), agent.settings.gamma
    for seed in EVALUATION_SEEDS:
        states, _, rewards, next_states, d = zip(*play(lambda s: mu(weights, s), env, seed))
        states = tf.stack([*states, next_states[-1]])
        q = agent.critic(tf.concat([states, agent.average_actor(states)], axis=1)).numpy()[:, 0]
        truth, pairs = (0.0 if d[-1] else q[-1]), []  # first, what follows the last s'
        for k, reward in enumerate(rewards[::-1], 1):  # backwards, from k steps before the end
            truth = reward + gamma * truth
            if d[-1] or gamma**k < 0.5:
                pairs.append((q[-1 - k], truth))  # q[-1] is that of the last s'
        yield sum(rewards), pairs


def plot(history, pairs):
    """The figure: training returns and their ten-episode mean; the critic's estimates and truth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    returns, episodes = [total for _, total in history], range(1, len(history) + 1)
    left.plot(episodes, returns, alpha=0.4, label="episode")
    left.plot(episodes[9:], [np.mean(returns[i - 10:i]) for i in episodes[9:]], label="mean of ten")
    left.set(title="Training", xlabel="episode", ylabel="return")
    left.legend()
    estimates, truths = np.reshape(pairs, (-1, 2)).T
    right.scatter(truths, estimates, s=4, alpha=0.3)
    right.plot(truths, truths, color="gray")  # the diagonal
    right.set(title="The critic's honesty", ylabel="estimate Q(s, mu(s))",
              xlabel="discounted rewards that followed, the rest by Q")
    return figure


def run(agent, env, out):
    """Train to the end or to Ctrl-C, leave results in the folder `out`, return the exit status."""
    path, history, pairs = Path(out) / "checkpoint.npz", agent.history, []
    agent.save(path)  # a good state to return to, should the very first episodes diverge
    first_step, began, saved_at = agent.buffer.added, time.perf_counter(), time.perf_counter()
    # a first Ctrl-C only puts the old handler back: the loop notices that, a second acts at once
    previous = signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, previous))
    try:
        for total in train(agent, env):
            now, mean = time.perf_counter(), np.mean(history[-10:], axis=0)[1]
            speed = (agent.buffer.added - first_step) / (now - began)
            print(f"\repisode {len(history)}/{agent.settings.episodes}, return {total:.5g}, mean "
                  f"of last 10 {mean:.5g}, {speed:.0f} steps/s".ljust(80), end="", flush=True)
            if signal.getsignal(signal.SIGINT) == previous:
                raise KeyboardInterrupt  # the first Ctrl-C was pressed
            if now > saved_at + SAVE_EVERY:
                agent.save(path)
                saved_at = now
        agent.save(path)  # whatever happens while it is evaluated
        signal.signal(signal.SIGINT, previous)  # as there is no episode left to finish
        returns, pairs = zip(*evaluate(agent, env))
        print(f"\nmean return of ten fresh episodes without noise: {np.mean(returns):.5g}")
        return 0
    except KeyboardInterrupt:
        print(f'\ninterrupted: python ddpg.py --resume --out "{out}" goes on from here')
        return 130
    except FloatingPointError as error:
        print(f"\nddpg.py: episode {len(history) + 1} diverged: {error}", file=sys.stderr)
        agent.restore(read_checkpoint(path))  # the local `history` stays, to show what happened
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # saving takes a moment: let it finish
        try:
            agent.save(path)
            rows = [f"{i},{step},{total}\n" for i, (step, total) in enumerate(history, 1)]
            path.with_name("returns.csv").write_text("episode,steps,return\n" + "".join(rows))
            agent.policy.save(path.with_name("actor.keras"))
            plot(history, sum(pairs, [])).savefig(path.with_name("returns.png"))
        finally:
            signal.signal(signal.SIGINT, previous)


def watch(agent, env, gif):
    """Play without noise and print the returns: ten episodes in a window, or one into `gif`."""
    for total, _ in evaluate(agent, env):
        print(f"return {total:.5g}")
        if gif:
            frames = (keras.utils.array_to_img(frame, scale=False) for frame in env.render())
            next(frames).save(gif, save_all=True, append_images=frames, loop=0,
                              duration=max(20, 1000 / (env.metadata.get("render_fps") or 30)))
            print(f"written to {gif}")
            break
    env.close()


def main(arguments=None):
    """The command line. Returns 0, 1 (diverged) or 130 (interrupted); bad input exits with 2."""
    parser = argparse.ArgumentParser("ddpg.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Train a DDPG agent, or resume or watch one.")
    for name, (default, _, _, text) in SETTINGS.items():
        kind, count = (int, "+") if name == "hidden" else (type(default), None)
        parser.add_argument(flag(name), type=kind, nargs=count, help=f"{text} (default: {default})")
    parser.add_argument("--out", type=Path, help="results folder (default: runs/<env>-seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--watch", action="store_true", help="play its policy in a window")
    parser.add_argument("--gif", action="store_true", help="play it once into policy.gif instead")
    asked = parser.parse_args(arguments)
    given = {name: vars(asked)[name] for name in SETTINGS if vars(asked)[name] is not None}
    show = "rgb_array_list" if asked.gif else "human" if asked.watch else None
    has_display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}
    if show == "human" and not has_display:
        parser.error("--watch finds no display: try --gif")
    out = asked.out or Path("runs/{env}-seed{seed}".format(**(vars(settings()) | given)))
    path, reuse = out / "checkpoint.npz", asked.resume or show  # whether to use the run in `out`
    about = f"cannot read {path} (train first, or choose another --out): "  # starts error messages
    try:
        saved = read_checkpoint(path) if reuse or path.exists() else None
        kept = saved["settings"] if reuse else {}
        if saved and not reuse and len(saved["history"]) < saved["settings"]["episodes"]:
            parser.error(f"--out {out}: an unfinished run; add --resume to go on, or use another")
        for name, value in given.items():
            if reuse and value != kept[name] and (name != "episodes" or value < kept[name]):
                parser.error(f"{flag(name)} {value} contradicts the run's {kept[name]}: omit it")
        about = about if reuse else ""
        chosen = settings(**(kept | given))
        if chosen.batch_size * max(chosen.hidden, default=0) <= 64 * 64:
            tf.config.threading.set_intra_op_parallelism_threads(1)  # too little for two threads

        about = f"cannot use --env {chosen.env} (choose another, or install what it needs): "
        os.environ.setdefault("SDL_FRAMEBUFFER_ACCELERATION", "0")  # OpenGL crashes beside TF
        env = gym.make(chosen.env, **({"render_mode": show} if show else {}))
        env.reset(seed=chosen.seed)  # an environment that cannot start replaces no finished run
        agent = Agent(env, chosen)
        about = f"cannot resume or play the run in {out} with --env {chosen.env}: "
        if reuse:
            agent.restore(saved)
        if show:
            watch(agent, env, out / "policy.gif" if asked.gif else None)
            return 0

        about = f"cannot write to --out {out} (choose another): "
        if saved and not reuse:
            print(f"replacing the finished run in {out}")
        agent.save(path)  # what cannot be written fails here, not after training
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        parser.error(" ".join(f"{about}{str(error) or repr(error)}".split()))
    return run(agent, env, out)


if __name__ == "__main__":
    status = main()
    if status == 0 and plt.get_backend().lower() != "agg":  # agg cannot show
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C closes the window without a traceback
        plt.show()
    sys.exit(status)
