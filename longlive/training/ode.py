"""Causal initialisation by ODE regression: a few-step causal student predicts the ends of a teacher's ODE trajectories.

Of a trajectory the states at the student's own timesteps are kept. The student sees each block of a clip at one of them, drawn at random,
and predicts the end of the trajectory (CausVid, Yin et al. 2025). Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longlive.cache.window import Window, block_mask
from longlive.generation.denoiser import Denoiser
from longlive.models.wan import WanTransformer
from longlive.ops.attention import SequenceView
from longlive.ops.flow_matching import warp_steps, x0_from_velocity
from longlive.training.teacher_forcing import teacher_forcing_mask
from longlive.types import Latents, Text

Trajectory = Float[Tensor, "B S F C H W"]  # from noise to clean


@torch.no_grad()
def trajectory(
    teacher: Denoiser, noise: Latents, text: Text, *, num_steps: int = 48, keep: Sequence[int], shift: float = 5.0
) -> Trajectory:
    """The states numbered `keep` of a teacher's Euler solution from `noise` (state 0) to the clean clip (state `num_steps`).

    With 48 steps and the student's shift, states 0, 12, 24 and 36 are at the student's timesteps (1000, 937.5, 833.33, 625).

    Raises:
        ValueError: when a number is not in 0 to `num_steps`.
    """
    if any(not 0 <= state <= num_steps for state in keep):
        raise ValueError(f"states {list(keep)} are not all on a trajectory of {num_steps} steps, which has states 0 to {num_steps}")
    timesteps = [*warp_steps([1000 * (num_steps - i) / num_steps for i in range(num_steps)], shift), 0.0]
    x, kept = noise, {}
    for number in range(num_steps + 1):
        if number in keep:
            kept[number] = x
        if number < num_steps:
            x = x + (timesteps[number + 1] - timesteps[number]) / 1000 * teacher(x, timesteps[number], text).velocity
    return torch.stack([kept[number] for number in keep], dim=1)


class ODERegression:
    """Mean of (x0 - end of the trajectory)^2, every block at one of the student's timesteps.

    Args:
        timesteps: of the states 0 … S - 2 of a trajectory; the last state is its end.
        window: of the attention at inference.
        clean_history: blocks attend to the ends of past blocks, as at inference, instead of their noisy states.
    """

    def __init__(
        self, network: WanTransformer, *, block: int, window: Window, timesteps: Sequence[float], clean_history: bool = False
    ) -> None:
        self.network, self.block, self.window, self.clean_history = network, block, window, clean_history
        self.timesteps = torch.tensor(list(timesteps))

    def __call__(self, states: Trajectory, text: Text, *, chosen: Int[Tensor, "B blocks"]) -> Tensor:
        """The loss of some trajectories; `chosen` is the number of the state at which each block is seen, 0 … S - 2.

        Raises:
            ValueError: when the trajectories do not have one state per timestep and the end.
        """
        batch, num_states, num_latent_frames = states.shape[:3]
        if num_states != len(self.timesteps) + 1:
            raise ValueError(f"trajectories of {num_states} states do not fit {len(self.timesteps)} timesteps and the end")
        per_frame = chosen.repeat_interleave(self.block, dim=1)  # [B, F]
        rows, columns = torch.arange(batch)[:, None], torch.arange(num_latent_frames)[None, :]
        noisy, end = states[rows, per_frame, columns], states[:, -1]
        t = self.timesteps.to(states.device)[per_frame]
        frames = tuple(range(num_latent_frames))
        rope = self.network.rope(*states.shape[-2:])
        tokens = rope.tokens_per_frame
        if self.clean_history:
            seen = end[:, : -self.block]
            mask = teacher_forcing_mask(frames[: seen.shape[1]], frames, block=self.block, window=self.window, tokens_per_frame=tokens)
            x, t_all = torch.cat([seen, noisy], dim=1), torch.cat([torch.zeros_like(t[:, : seen.shape[1]]), t], dim=1)
            view = SequenceView(rope.at((*frames[: seen.shape[1]], *frames)), mask.to(states.device))
        else:
            mask = block_mask(frames, frames, block=self.block, window=self.window, tokens_per_frame=tokens)
            x, t_all, view = noisy, t, SequenceView(rope.at(frames), mask.to(states.device))
        velocity = self.network(x, t_all, text, view)[:, -num_latent_frames:]
        return (x0_from_velocity(velocity, noisy, t).float() - end.float()).square().mean()
