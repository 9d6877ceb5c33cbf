"""Check the package against recorded vectors: `python scripts/check_golden.py FOLDER`.

Reads FOLDER/manifest.json, prints a line per case (name, kind, largest absolute error) and exits 1 when one is above 2e-4
or a case cannot be run. Gradients are compared after scaling both sides so that the recorded one has a largest value of
at least 1: a tiny gradient must not pass for being tiny.

With `--engine` the rollouts run as `engine.steady` makes them: whole passes recorded and replayed (as operations, so that it runs on a
CPU too), or layers compiled by torch.compile. Their lines say how many passes did so, and a rollout without any fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.checkpoints import configs, convert
from longlive.engine.steady import Capture, Compiler, SteadyPasses, default_compiler, operation_tape
from longlive.generation.caches import ring_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser, Prediction
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.stream import stream
from longlive.generation.transition import Transition
from longlive.models.lora import merge_lora
from longlive.models.text import embed
from longlive.models.vae import decode_video, encode_video
from longlive.models.wan import WanTransformer
from longlive.ops import flow_matching
from longlive.training.dmd import DMD

TOLERANCE = 2e-4


def distance(ours: Tensor, recorded: Tensor) -> float:
    """Largest absolute difference; infinite when shapes differ or a value is not finite."""
    if ours.shape != recorded.shape or not torch.isfinite(ours).all():
        return float("inf")
    return (ours.double() - recorded.double()).abs().max().item()


def gradient_distance(ours: Tensor | None, recorded: Tensor) -> float:
    """`distance` relative to the recorded gradient's largest value, when that is below 1."""
    if ours is None:
        raise ValueError("no gradient arrived")
    return distance(ours, recorded) / min(1.0, recorded.abs().max().item())


class Folder:
    """A folder of vectors and the description of what they are."""

    def __init__(self, path: Path) -> None:
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{manifest} does not exist; give a folder of golden vectors")
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(manifest.read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry. Raises ValueError when they are not those its description promises."""
        tensors = load_file(self.path / f"{name}.safetensors")
        promised = {key: tuple(shape) for key, (_, shape) in self.entries[name]["tensors"].items()}
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != promised:
            raise ValueError(
                f"{name}.safetensors holds other tensors than the manifest says: {sorted(found.items() ^ promised.items())[:4]}"
            )
        return tensors

    def transformer(self, name: str) -> WanTransformer:
        config = dict(self.entries[name]["config"])
        model = WanTransformer(**config)
        model.load_state_dict(self.tensors(name))
        return model.eval()


class Engine(NamedTuple):
    """What `SteadyPasses` does to the passes of a rollout; without either they run as they are."""

    compiler: Compiler | None = None
    capture: Capture | None = None


ENGINES: dict[str, Callable[[], Engine]] = {
    "off": Engine,
    "recorded": lambda: Engine(capture=operation_tape),
    "compiled": lambda: Engine(compiler=default_compiler(torch.device("cpu"))),
}


class Case:
    """One entry: its settings, its tensors, and the comparison its kind asks for."""

    def __init__(self, folder: Folder, name: str, engine: Engine = Engine()) -> None:  # noqa: B008  # immutable
        self.folder, self.name, self.settings, self.engine = folder, name, folder.entries[name], engine
        self.num_passes = 0  # that were compiled or recorded

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self.folder.tensors(self.name)

    def ring(self, model: WanTransformer, like: Tensor, num_latent_frames: int) -> RingCache:
        visible, sink = self.settings["window_frames"], self.settings["sink_frames"]
        ring = ring_cache(
            model,
            *like.shape[-2:],
            window=Window.full(num_latent_frames) if visible == -1 else Window.of(visible, sink),
            batch=like.shape[0],
            relative=self.settings.get("relative_rope", False),
        )
        assert isinstance(ring, RingCache)
        return ring

    def one_pass(self, prediction: Prediction) -> Iterator[float]:
        """The flow, and x0 at the table's level nearest to t: so the recorded x0 was made (the flow saw t itself)."""
        yield distance(prediction.velocity, self.tensors["flow"])
        level = flow_matching.nearest_timestep(prediction.t, self.settings.get("timestep_shift", 5.0))
        yield distance(Prediction(prediction.noisy, prediction.velocity, level).x0, self.tensors["x0"])

    def weights(self) -> Iterator[float]:
        self.folder.tensors(self.name)
        yield 0.0

    def schedule(self) -> Iterator[float]:
        given, shift = self.tensors, self.settings["timestep_shift"]
        yield distance(flow_matching.sigmas(shift), given["sigmas"])
        yield distance(flow_matching.NUM_TIMESTEPS * flow_matching.sigmas(shift), given["timesteps"])
        yield distance(flow_matching.training_weights(shift), given["training_weights"])
        for key in (key for key in given if key.startswith("warped_")):
            yield distance(torch.tensor(flow_matching.warp_steps([int(step) for step in key.split("_")[1:]], shift)), given[key])
        batched = {key: given[key][:, None] for key in ("x0", "noise", "xt", "flow", "x0_from_flow", "t")}
        yield distance(flow_matching.add_noise(batched["x0"], batched["noise"], batched["t"]), batched["xt"])
        yield distance(flow_matching.x0_from_velocity(batched["flow"], batched["xt"], batched["t"]), batched["x0_from_flow"])

    def rollout(self) -> Iterator[float]:
        settings, given = self.settings, self.tensors
        model = self.folder.transformer(settings["weights"])
        noise, block = given["noise"], settings["frames_per_block"]
        passes = SteadyPasses(model, block=block, compiler=self.engine.compiler, capture=self.engine.capture) if any(self.engine) else None
        renoise = iter(given["renoise"].flatten(0, 1))
        rollout = Rollout(
            Denoiser(model),
            self.ring(model, noise, noise.shape[1]),
            FewStep(flow_matching.warp_steps(settings["denoising_steps"], settings["timestep_shift"]), lambda like: next(renoise)),
            context_t=settings["context_timestep"],
        )
        prompts = [f"prompt_embeds.{i}" for i in range(len(settings["switch_frames"]) + 1)]
        made = stream(
            rollout,
            PromptSchedule.at_latent_frames(prompts, settings["switch_frames"]),
            project_text=lambda key: model.project_text(given[key]),
            noise=lambda frames: noise[:, frames.start : frames.stop],
            block=block,
            num_latent_frames=noise.shape[1],
            transition=Transition(keep_sink=settings["global_sink"]),
        )
        yield distance(torch.cat([part.latents for part in made], dim=1), given["latents"])
        if passes is not None:
            self.num_passes = passes.num_passes
            if not self.num_passes:
                raise ValueError("no pass was compiled or recorded")

    def teacher(self) -> Iterator[float]:
        given = self.tensors
        model = self.folder.transformer(self.settings["weights"])
        yield from self.one_pass(Denoiser(model)(given["x"], given["t"], given["prompt_embeds"]))

    def lora(self) -> Iterator[float]:
        given, adapter = self.tensors, self.settings["lora"]
        model = self.folder.transformer(self.settings["weights"])
        model = merge_lora(model, self.folder.tensors(adapter), alpha=self.folder.entries[adapter]["alpha"])
        num_latent_frames = given["x"].shape[1]
        view = self.ring(model, given["x"], num_latent_frames).view(range(num_latent_frames))
        yield from self.one_pass(Denoiser(model)(given["x"], given["t"], given["prompt_embeds"], view))

    def vae(self) -> Iterator[float]:
        state, given = self.folder.tensors(self.settings["weights"]), self.tensors
        vae = AutoencoderKLWan(**configs.vae_config(state)).eval()
        vae.load_state_dict(convert.vae_to_diffusers(state))
        yield distance(encode_video(vae, given["pixels"]).transpose(1, 2), given["latents"])
        for frames_per_call in (1, 3, given["z"].shape[2]):
            yield distance(decode_video(vae, given["z"].transpose(1, 2), frames_per_call=frames_per_call), given["decoded"])

    def text_encoder(self) -> Iterator[float]:
        state, given = self.folder.tensors(self.settings["weights"]), self.tensors
        encoder = UMT5EncoderModel(UMT5Config(**configs.text_config(state))).eval()
        encoder.load_state_dict(convert.text_to_transformers(state), strict=False)
        yield distance(embed(encoder, given["ids"], given["mask"]), given["prompt_embeds"])

    @torch.enable_grad()
    def dmd(self) -> Iterator[float]:
        settings, given = self.settings, self.tensors
        critic = self.folder.transformer(settings["critic"])
        teacher = self.folder.transformer(settings["teacher"])
        dmd = DMD(Denoiser(teacher), Denoiser(critic), guidance_scale=1 + settings["guidance"], shift=settings["timestep_shift"])
        text, negative = given["prompt_embeds"], given["negative_embeds"]
        yield distance(dmd.timesteps(given["drawn_step"]), given["t"])
        clip = given["clip"].clone().requires_grad_()
        found = dmd.generator_loss(clip, text, negative, t=given["t"], noise=given["noise"], fresh=given["fresh"])
        found.loss.backward()
        yield distance(found.noisy, given["noisy"])
        yield distance(found.gradient, given["dmd_gradient"])
        yield distance(found.loss.detach().reshape(1), given["loss"])
        yield gradient_distance(clip.grad, given["clip_grad"])
        loss = dmd.critic_loss(clip, text, t=given["critic_t"], noise=given["critic_noise"])
        loss.backward()
        yield distance(loss.detach().reshape(1), given["critic_loss"])
        yield gradient_distance(critic.patch_embedding.weight.grad, given["critic_grad_patch_embedding"])


KINDS: dict[str, Callable[[Case], Iterator[float]]] = {
    kind: getattr(Case, kind) for kind in ("weights", "rollout", "schedule", "teacher", "lora", "vae", "text_encoder", "dmd")
}


@torch.no_grad()
def check(path: Path, engine: Engine = Engine()) -> bool:  # noqa: B008  # immutable
    """Print a line per case; True when every one is within the tolerance."""
    folder = Folder(path)
    good = True
    for name, settings in folder.entries.items():
        kind = settings["kind"]
        if kind not in KINDS:
            print(f"{name:32} {kind:14} unknown kind; this checker knows {', '.join(KINDS)}")
            good = False
            continue
        case = Case(folder, name, engine)
        try:
            error = max(KINDS[kind](case))
        except (KeyError, OSError, RuntimeError, ValueError) as problem:
            print(f"{name:32} {kind:14} cannot be checked: {problem}")
            good = False
            continue
        passed = error <= TOLERANCE
        good &= passed
        through = f"   {case.num_passes} passes through the engine" if case.num_passes else ""
        print(f"{name:32} {kind:14} {error:.2e}{through}{'' if passed else f'   ABOVE {TOLERANCE:.0e}'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the package against recorded vectors.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), default="off", help="how rollouts run (default %(default)s)")
    options = parser.parse_args()
    try:
        return 0 if check(options.folder, ENGINES[options.engine]()) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
