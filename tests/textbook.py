"""The equations once more, slowly: float64 NumPy, a sample at a time, gradients derived by hand."""

import numpy as np


def symmetric_ppo(logprob, old_logprob, advantage, alpha, beta, Z, clip_coef, importance_weighted):
    """Per sample: forward terms (batch,), reverse terms (batch,), gradients of the mean loss in
    log π_d (batch, D). `logprob`, `old_logprob`: (batch, D); `advantage`: (batch,)."""
    forward = np.zeros(len(advantage))
    reverse = np.zeros(len(advantage))
    gradient = np.zeros(logprob.shape)
    for i, A in enumerate(advantage.tolist()):
        dimensions = len(logprob[i])
        pi = np.exp(logprob[i].sum())
        pi_old = np.exp(old_logprob[i].sum())
        r = pi / pi_old
        clipped = min(max(r, 1 - clip_coef), 1 + clip_coef)
        inside = 1 - clip_coef <= r <= 1 + clip_coef
        m = 1 if inside or r * A <= clipped * A else 0

        forward[i] = -min(r * A, clipped * A)
        gradient[i] = alpha * -m * A * r  # d r / d log π_d = r, in every dimension d
        if importance_weighted:
            reverse[i] = -m * A * Z * (1 - pi) / pi_old
            gradient[i] += beta * m * A * Z * r
        else:
            reverse[i] = -m * A * Z * sum(1 - np.exp(logprob[i])) / dimensions
            gradient[i] += beta * m * A * Z * np.exp(logprob[i]) / dimensions
    return forward, reverse, gradient / len(advantage)


def symmetric_a2c(logprob, advantage, alpha, beta, Z):
    """As `symmetric_ppo`; d π_d / d log π_d = π_d."""
    forward = np.zeros(len(advantage))
    reverse = np.zeros(len(advantage))
    gradient = np.zeros(logprob.shape)
    for i, A in enumerate(advantage.tolist()):
        pi = np.exp(logprob[i])
        forward[i] = -A * sum(logprob[i])
        reverse[i] = -A * Z * sum(1 - pi) / len(pi)
        gradient[i] = -alpha * A + beta * A * Z * pi / len(pi)
    return forward, reverse, gradient / len(advantage)


def gae(rewards, values, dones, final_values, next_value, gamma, gae_lambda):
    """A_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode or of the rollout.

    All (num_steps, num_envs) but `next_value` (num_envs,). `final_values`: what the last
    observation of an episode is worth; 0 where the episode ended by itself."""
    num_steps, num_envs = rewards.shape
    advantages = np.zeros((num_steps, num_envs))
    for env in range(num_envs):
        for start in range(num_steps):
            for t in range(start, num_steps):
                if dones[t, env]:
                    following = final_values[t, env]
                else:
                    following = values[t + 1, env] if t + 1 < num_steps else next_value[env]
                delta = float(rewards[t, env]) + gamma * float(following) - float(values[t, env])
                advantages[start, env] += (gamma * gae_lambda) ** (t - start) * delta
                if dones[t, env]:
                    break
    return advantages
