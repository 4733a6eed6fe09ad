"""Atari, by how it behaves: what is played, seen and scored, and what the learner gets of it.

Real games are played through `collect`, cut off at 500 frames so that lost lives, game overs and
truncations all happen; then each is played again, alone, by ale-py without the scripts' settings
for lives and resets.
"""

import functools
import inspect
from collections import deque
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, WarpFrame

import ppo_baseline
import sa2c_atari
import sppo_atari
from sppo_atari import Args, AtariAgent, Games

FIRE = 1
NUM_STEPS, NUM_ROLLOUTS = 16, 30
CUT_OFF = {"max_num_frames_per_episode": 500}
CPU = torch.device("cpu")
SCRIPTS = pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline])
CLASSES = pytest.mark.parametrize("script", [sppo_atari, ppo_baseline])  # sa2c_atari has the first
AtariVectorEnv = ale_py.vector_env.AtariVectorEnv


def set_options(monkeypatch, **options):
    """Of ale-py's environment, beside those that the scripts set."""
    options_set = functools.partial(AtariVectorEnv, **{"num_threads": 1} | options)
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", options_set)


# -------------------------------------------------------------------------------------- the games


@CLASSES
@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_actions_are_sticky_only_if_asked(script, sticky, monkeypatch):
    """By both names of the game, though gym.make has sticky actions for one of them. Breakout has
    no chance in it: without no-ops and sticky actions, games with different seeds are one game."""
    set_options(monkeypatch, noop_max=0)
    rng = np.random.default_rng(0)
    both = []
    for name in ("ALE/Breakout-v5", "BreakoutNoFrameskip-v4"):
        np.random.seed(0)
        both.append(script.Games(script.Args(name, repeat_action_probability=sticky), 4))
    one, other = both
    for _ in range(100):
        action = np.full(4, rng.integers(4))
        one.step(action)
        other.step(action)
        np.testing.assert_array_equal(one.obs, other.obs)
    assert (one.obs == one.obs[0]).all() == (sticky == 0)


@pytest.mark.parametrize("game, tolerance", [("Breakout", 0), ("Boxing", 0), ("MsPacman", 0.006)])
def test_preprocessing_and_score_are_those_of_stable_baselines(monkeypatch, game, tolerance):
    """`tolerance`: share of pixels that may differ by more than 1; ale-py maximises over greys, not
    over colours."""
    set_options(monkeypatch, noop_max=0, use_fire_reset=False)
    games = Games(Args(f"ALE/{game}-v5"), 1)
    # AtariWrapper without no-ops, lives and clipping, and without its FIRE at reset
    wrapped = WarpFrame(MaxAndSkipEnv(gym.make(f"{game}NoFrameskip-v4")))
    frames = deque([np.zeros((84, 84))] * 3 + [wrapped.reset()[0][:, :, 0]], maxlen=4)
    rng = np.random.default_rng(0)
    differences, score = [], 0
    for t in range(400):
        difference = np.abs(games.obs[0].astype(float) - np.stack(frames))
        differences.append(difference.max() if tolerance == 0 else difference > 1)
        serves = t % 40 == 0 or games.must_fire[0]
        action = FIRE if serves else rng.integers(len(games.actions))
        (sign,), _ = games.step(np.array([action]))
        frame, reward, terminated, *_ = wrapped.step(action)
        frames.append(frame[:, :, 0])
        score += reward
        assert sign == np.sign(reward) and games.score == score and games.length == t + 1
        if terminated:  # what is seen after that is a matter of the reset
            break
    assert len(differences) > 150 and score
    assert np.mean(differences) <= tolerance


@CLASSES
def test_no_game_stands_waiting_for_fire(script, monkeypatch):
    """Native Breakout waits for FIRE after a lost life; a learner that never presses it would play
    on forever."""
    set_options(monkeypatch)
    np.random.seed(0)
    games = script.Games(script.Args("ALE/Breakout-v5"), 4)
    over = np.zeros(4, dtype=bool)
    for _ in range(300):
        games.step(np.zeros(4, int))
        over |= games.over
    assert over.all()


def test_points_made_while_fire_is_pressed_for_the_learner_count(monkeypatch):
    set_options(monkeypatch)
    np.random.seed(0)
    games = Games(Args("ALE/DemonAttack-v5"), 4)
    for _ in range(80):
        games.must_fire[:] = True
        games.step(np.zeros(4, int))
    assert games.score.min() >= 10


@SCRIPTS
def test_runs_share_no_game(script, monkeypatch):
    """ale-py's own way, seed, seed + 1, …, gives the runs with seeds 1 and 2 seven of eight games
    in common. And a run that is resumed does not begin with the games of its beginning."""

    class Caught(Exception):
        pass

    def catch(self, seed):
        raise Caught(seed)

    monkeypatch.setattr(AtariVectorEnv, "reset", catch)
    set_options(monkeypatch)
    seeds = []
    for seed in (1, 2, 2**40):
        args = script.Args("ALE/Breakout-v5", seed=seed, num_envs=2, num_steps=256)
        for iteration in (0, 1):
            with pytest.raises(Caught) as caught:
                script.main(args, {"step": 512 * iteration})
            seeds += caught.value.args[0].tolist()
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 2
    assert 0 <= min(seeds) and 2**30 < max(seeds) < 2**31  # what ale-py takes


# ------------------------------------------------------------------------------------ the rollout


def play_again(env_id, seed, actions):
    """One game, NEXT_STEP: the end of a game is seen before the reset, which takes one call more.
    Rows (obs, reward, lost life, game over, truncated, score, length)."""
    game = gym.spec(env_id).kwargs["game"]
    env = AtariVectorEnv(game, 1, reward_clipping=False, **CUT_OFF)
    rows, score, length = [], 0, 0
    obs, info = env.reset(seed=np.array([seed]))
    for action in actions:
        before, lives = obs[0], info["lives"][0]
        obs, reward, (terminated,), (truncated,), info = env.step(np.array([action]))
        over = terminated or truncated
        score += reward[0]
        length += 1
        lost_life = info["lives"][0] < lives and not over
        rows.append((before, reward[0], lost_life, terminated, truncated, score, length))
        if over:
            obs, _, _, _, info = env.step(np.array([action]))
            score = length = 0
    return zip(*rows)


@pytest.fixture(
    scope="module",
    params=[
        (sppo_atari, "ALE/Breakout-v5"),
        (sa2c_atari, "ALE/MsPacman-v5"),
        (ppo_baseline, "ALE/Breakout-v5"),
    ],
    ids=["sppo_atari, Breakout", "sa2c_atari, MsPacman", "ppo_baseline, Breakout"],
)
def story(request):
    """What `collect` says of the games, and what is true; arrays (steps, games, …), rollout after
    rollout."""
    script, env_id = request.param
    np.random.seed(0)
    seeds = np.random.randint(2**31, size=4)
    np.random.seed(0)  # `Games` draws the same
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_options(monkeypatch, **CUT_OFF)
        games = script.Games(script.Args(env_id), 4)
    torch.manual_seed(0)
    agent = AtariAgent(games.envs.single_action_space.n)
    played, step = [], games.envs.step
    games.envs.step = lambda action: played.append(action.copy()) or step(action)
    rollouts, finished = [], []
    for i in range(NUM_ROLLOUTS):
        rollout, ended = script.collect(games, agent, NUM_STEPS, CPU)
        rollouts.append(rollout)
        finished += [(i * NUM_STEPS + t, score, length) for t, score, length in ended]
    arrays = {name: torch.cat([x[name] for x in rollouts]).numpy() for name in rollouts[0]}
    told = SimpleNamespace(**arrays, finished=finished, played=np.stack(played))

    again = [play_again(env_id, seed, actions) for seed, actions in zip(seeds, told.played.T)]
    columns = [np.stack([np.stack(field) for field in column], axis=1) for column in zip(*again)]
    names = ("obs", "rewards", "lost_life", "game_over", "truncated", "score", "length")
    truth = SimpleNamespace(**dict(zip(names, columns)), has_fire="Breakout" in env_id)
    truth.over = truth.game_over | truth.truncated
    return told, truth, agent


def test_the_story_has_everything(story):
    _, truth, _ = story
    assert truth.truncated.sum() > 1 and truth.rewards.any()
    if truth.has_fire:
        assert truth.game_over.sum() > 1 and truth.lost_life.sum() > 10
        assert truth.lost_life[NUM_STEPS - 1 :: NUM_STEPS].any()  # with the last step of a rollout
    else:
        assert truth.rewards.max() >= 10  # a dot


def test_observations_and_rewards_are_those_of_the_games(story):
    """So the row after a game over shows the new game, and none shows a mixture. A game knows
    nothing of its neighbours."""
    told, truth, _ = story
    np.testing.assert_array_equal(told.obs, truth.obs)
    np.testing.assert_array_equal(told.rewards, np.sign(truth.rewards))
    new_game = np.roll(truth.over, 1, axis=0)
    new_game[0] = True
    assert not told.obs[new_game][:, :3].any()  # a stack with one frame in it


def test_log_probabilities_and_values_are_those_of_their_row(story):
    told, _, agent = story
    rows = slice(None, None, 7)
    with torch.no_grad():
        policy, values = agent(torch.from_numpy(told.obs[rows]).flatten(0, 1))
    np.testing.assert_allclose(told.values[rows].flatten(), values, rtol=1e-4, atol=1e-5)
    if hasattr(told, "logprobs"):
        logprobs = policy.log_prob(torch.from_numpy(told.actions[rows]).flatten())
        np.testing.assert_allclose(told.logprobs[rows].flatten(), logprobs, rtol=1e-4)
    following = (np.roll(told.values, -1, axis=0) * ~told.dones)[:-1]
    np.testing.assert_allclose(told.next_values[:-1], following, rtol=1e-4, atol=1e-5)


def test_dones_are_lost_lives_game_overs_and_truncations(story):
    told, truth, _ = story
    np.testing.assert_array_equal(told.dones, truth.lost_life | truth.over)


def test_after_a_lost_life_fire_is_played_and_is_no_sample(story):
    """Where the game has it."""
    told, truth, _ = story
    valid = np.roll(~truth.lost_life, 1, axis=0) | (not truth.has_fire)
    valid[0] = True
    np.testing.assert_array_equal(told.valid, valid)
    np.testing.assert_array_equal(told.played, np.where(valid, told.actions, FIRE))


def test_finished_games_are_reported_with_score_and_length(story):
    """Raw scores of whole games, over several in a row: the sums start anew with each, lost lives
    do not matter."""
    told, truth, _ = story
    ends = np.argwhere(truth.over).tolist()
    assert told.finished == [(t, truth.score[t, i], truth.length[t, i]) for t, i in ends]


# ------------------------------------------------------------------------ what the learner learns


@SCRIPTS
def test_update_gets_what_collect_and_gae_say(script, tmp_path, monkeypatch):
    """Two iterations of the real thing, with lost lives and games that are over; `collect`, `gae`
    and `update` are looked at, not replaced. No value crosses the end of an episode, and the steps
    at which FIRE was pressed for the learner never reach it."""
    seen = {"collect": [], "gae": [], "update": []}

    def watch(name):
        function = getattr(script, name)

        def watched(*args):
            result = function(*args)
            seen[name].append((inspect.signature(function).bind(*args).arguments, result))
            return result

        monkeypatch.setattr(script, name, watched)

    monkeypatch.chdir(tmp_path)
    set_options(monkeypatch, max_num_frames_per_episode=300)
    for name in seen:
        watch(name)
    args = script.Args("ALE/Breakout-v5", num_envs=2, num_steps=96, total_timesteps=384)
    args.cuda = False
    args.eval_episodes = 1
    args.update_epochs = 1
    args.num_minibatches = 4
    args.reward_noise = 0.3
    script.main(args)

    collected = [rollout for _, (rollout, _) in seen["collect"]]
    assert len(collected) == 2 and not collected[0]["valid"].all() and collected[0]["dones"].any()
    for rollout, (given, advantages), (learned, _) in zip(collected, seen["gae"], seen["update"]):
        assert (
            (given["rewards"] == rollout["rewards"]) ^ (given["rewards"] == 1 - rollout["rewards"])
        ).all()
        assert (given["rewards"] != rollout["rewards"]).float().mean() == pytest.approx(
            0.3, abs=0.1
        )
        assert torch.equal(given["next_values"], rollout["next_values"] * ~rollout["dones"])
        assert torch.equal(given["dones"], rollout["dones"])
        assert (given["gamma"], given["gae_lambda"]) == (args.gamma, args.gae_lambda)
        *inputs, learned_advantages, returns = learned["batch"]
        valid = rollout["valid"]
        for x, name in zip(inputs, ("obs", "actions", "logprobs")):
            assert torch.equal(x, rollout[name][valid])
        assert torch.equal(learned_advantages, advantages[valid])
        assert torch.equal(returns, (advantages + rollout["values"])[valid])


def test_games_are_scored_to_the_end_of_the_first_one(monkeypatch):
    """Short games come twice before the longest is over; counting them again would favour short
    games. Every evaluation plays the same."""
    step, seen = Games.step, []

    def watched(self, action):
        result = step(self, action)
        seen.append((self.over.copy(), self.score.copy()))
        return result

    monkeypatch.setattr(Games, "step", watched)
    set_options(monkeypatch)
    torch.manual_seed(0)
    agent = AtariAgent(4)
    args = Args(eval_episodes=3, seed=2)
    scores = sppo_atari.evaluate(agent, args, CPU, None)
    over, score = map(np.stack, zip(*seen))
    np.testing.assert_array_equal(scores, score[over.argmax(0), range(3)])
    assert len(set(scores)) > 1 and over.sum() >= 3
    np.testing.assert_array_equal(sppo_atari.evaluate(agent, args, CPU, None), scores)
