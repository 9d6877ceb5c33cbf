"""From settings to a stage of training: networks, data and the stage itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.window import Window
from longlive.checkpoints import store
from longlive.config import CausalInitConfig, DistillationConfig, OdeConfig, TeacherConfig, TrainConfig
from longlive.engine.apply import Recipe, Sharding, apply
from longlive.engine.low_precision import resolve_bfloat16_linears
from longlive.generation.caches import history_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.dimensions import Timing
from longlive.generation.prompt_files import read_scripts
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.models.text import TextEncoder
from longlive.models.vae import settings_of
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments
from longlive.ops.flow_matching import warp_steps
from longlive.parallel.world import SharedChoices, World, barrier, choose_dtype, rank_generator
from longlive.training.clips import Embed, StreamingTuner, anchor_frame
from longlive.training.distillation import DistillationStage
from longlive.training.dmd import DMD
from longlive.training.ema import EMA
from longlive.training.embeddings import TextEmbeddings, fingerprint
from longlive.training.miniature.autoencoder import AutoencoderStage
from longlive.training.miniature.causal_init import CausalInitStage
from longlive.training.miniature.exact_score import ExactScore, check_world
from longlive.training.miniature.language import LanguageStage
from longlive.training.miniature.starting_vae import starting_vae
from longlive.training.miniature.teacher import TeacherStage
from longlive.training.miniature.tiny_decoder import TinyDecoderStage
from longlive.training.networks import TrainableNetwork, load_network
from longlive.training.ode import ODERegression
from longlive.training.ode_init import OdeInitStage
from longlive.training.ode_pairs import OdePairs
from longlive.training.prompts import Chain, PromptSampler, read_chains
from longlive.training.trainer import Stage, Tuning, weights_digest
from longlive.training.validation import Preview, miniature_schedules, read_by_oracle
from longlive.types import Latents, Text


class Built(NamedTuple):
    """A stage, what it trains, and for adapters the digest of the weights under them (None otherwise)."""

    stage: Stage
    tuning: Tuning = "full"
    base: str | None = None


def build(config: TrainConfig, world: World, device: torch.device) -> Built:
    """The stage that `config.stage` names, with new weights drawn from `config.seed`.

    Raises:
        ValueError, FileNotFoundError: for a setting or a file that is missing or does not fit.
    """
    torch.manual_seed(config.seed)  # initial weights; everything else draws from the stage's own generators
    if config.stage == "language":
        return Built(LanguageStage(config.language, steps=config.steps, seed=config.seed))
    if config.stage == "autoencoder":
        return Built(AutoencoderStage(config.autoencoder, starting_vae(config.autoencoder), steps=config.steps, seed=config.seed))
    if config.stage == "tiny_decoder":
        _check_exported("tiny_decoder", autoencoder=config.tiny_decoder.autoencoder)
        vae = store.load_vae(config.tiny_decoder.autoencoder).requires_grad_(False)
        return Built(TinyDecoderStage(config.tiny_decoder, vae, steps=config.steps, seed=config.seed))
    if config.stage in ("init", "long"):
        return _distillation(config, config.init if config.stage == "init" else config.long, world, device)
    if config.stage == "causal_init" and config.causal_init.objective == "ode":
        return Built(_ode_init(config, config.ode, world, device))
    run = {"data": Path(config.run), "steps": config.steps, "seed": config.seed}
    if config.stage == "teacher":
        return Built(TeacherStage(config.teacher, *_miniature_parts(config.teacher, "teacher"), **run))
    return Built(CausalInitStage(config.causal_init, *_miniature_parts(config.causal_init, "causal_init"), **run))


def _check_exported(stage: str, **folders: str) -> None:
    """Raises ValueError unless the exports of earlier stages are there."""
    for earlier, folder in folders.items():
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder} does not exist; run configs/miniature/{earlier}.yaml first, or say where its export is: {stage}.{earlier}=…"
            )


def _miniature_parts(config: CausalInitConfig | TeacherConfig, stage: str) -> tuple[WanTransformer, AutoencoderKLWan, TextEncoder]:
    """The transformer in training, and the earlier stages' exports, frozen."""
    _check_exported(stage, language=config.language, autoencoder=config.autoencoder)
    encoder, tokenizer = store.load_text_encoder(config.language)
    if config.initial is None:
        network = WanTransformer(**arguments(config.size))
    else:
        network = load_network(config.initial).requires_grad_(True)
    vae = store.load_vae(config.autoencoder).requires_grad_(False)
    return network, vae, TextEncoder(encoder, tokenizer, text_len=network.config.text_len)


def _distillation(run: TrainConfig, config: DistillationConfig, world: World, device: torch.device) -> Built:
    """Generator, critic and teacher, the data, and the tuner that makes videos."""
    required = ("generator", "teacher", "components", "prompts")
    generator_from, teacher_from, components, prompts = _required(config, required, section=run.stage, file=f"train_{run.stage}")
    chains = read_chains(prompts, config.switch_prompts)
    if config.exact_score:
        check_world((prompt for chain in chains for prompt in chain), height=config.height, width=config.width)
    compute = choose_dtype("auto", device)
    vae = store.load_vae(components, dtype=compute).to(device).requires_grad_(False)  # type: ignore[arg-type]
    network = load_network(generator_from, lora=config.generator_lora, device=device)
    base = weights_digest(network.state_dict()) if config.lora_rank is not None else None
    critic = load_network(config.critic or teacher_from, device=device)
    teacher = load_network(teacher_from, dtype=compute, device=device)
    schedules = _schedules(config, chains)
    texts = [prompt for chain in chains for prompt in chain] + [cue.prompt for plan in schedules for cue in plan.cues]
    embed, negative = _embeddings(config, texts, components, network, world, device)

    average = EMA(network, decay=config.ema_decay, warm_up=False) if config.ema_decay and config.lora_rank is None else None
    sharding = Sharding(param_dtype=compute)
    trained = [_trained(one, config, lr, sharding) for one, lr in ((network, config.lr), (critic, config.critic_lr))]
    apply(teacher, Recipe(bfloat16_linears=resolve_bfloat16_linears(config.bfloat16_linears), sharding=sharding))
    if average is not None:
        apply(average.average, Recipe(sharding=sharding))
    random = {name: rank_generator(run.seed + n, world.rank) for n, name in enumerate(("noise", "timesteps"), 1)}
    stage = DistillationStage(
        config,
        _tuner(run, config, network, vae, embed, chains, random["noise"], world, device),
        DMD(
            Denoiser(teacher),
            Denoiser(critic),
            guidance_scale=config.guidance_scale,
            guidance_rescale=config.guidance_rescale,
            shift=config.timestep_shift,
        ),
        *trained,
        steps=run.steps,
        negative=negative.expand(config.batch, -1, -1),
        random=random,
        validate=_preview(run, config, schedules, vae, embed, world),
        world=world,
        average=average,
        exact=ExactScore(vae, num_frames=config.clip_frames, switch_at=config.overlap).of if config.exact_score else None,
    )
    return Built(stage, "full" if config.lora_rank is None else "lora", base)


def _required(config: DistillationConfig | OdeConfig, names: Sequence[str], *, section: str, file: str) -> list[str]:
    """The values of settings without a default. Raises ValueError for the first that is not set."""
    for name in names:
        if getattr(config, name) is None:
            raise ValueError(f"{section}.{name} is not set; see configs/{file}.yaml")
    return [str(getattr(config, name)) for name in names]


def _trained(network: WanTransformer, config: DistillationConfig | OdeConfig, lr: float, sharding: Sharding) -> TrainableNetwork:
    lora = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha} if isinstance(config, DistillationConfig) else {}
    bfloat16 = isinstance(config, DistillationConfig) and resolve_bfloat16_linears(config.bfloat16_linears)
    recipe = Recipe(checkpointing=config.checkpointing, bfloat16_linears=bfloat16, sharding=sharding)
    return TrainableNetwork(network, lr=lr, betas=config.betas, weight_decay=config.weight_decay, recipe=recipe, **lora)  # type: ignore[arg-type]


def _embeddings(
    config: DistillationConfig | OdeConfig,
    prompts: Sequence[str],
    components: str,
    network: WanTransformer,
    world: World,
    device: torch.device,
) -> tuple[Embed, Text]:
    """Embeddings of all `prompts`, computed once, after which the encoder is released; and that of the negative prompt, `[1, L, E]`."""
    encoder, tokenizer = store.load_text_encoder(components, dtype=choose_dtype("auto", device))
    text_encoder = TextEncoder(encoder, tokenizer, text_len=network.config.text_len, device=device)
    known = TextEmbeddings(config.embeddings, text_encoder.encode, name=fingerprint(text_encoder))
    known.prepare(prompts[world.rank :: world.size], batch=16)
    barrier(world)  # wait for the other ranks' shares
    negative = torch.zeros(1, text_encoder.text_len, text_encoder.width)
    if config.negative_prompt is not None:
        negative = known([config.negative_prompt])
    known.encode = None
    return lambda texts: known(texts).to(device), negative.to(device)


def _ode_init(run: TrainConfig, config: OdeConfig, world: World, device: torch.device) -> OdeInitStage:
    """Generates the pairs that are missing, then builds the stage that learns from them."""
    teacher_from, components, prompts_from = _required(config, ("teacher", "components", "prompts"), section="ode", file="train_ode")
    compute = choose_dtype("auto", device)
    vae = store.load_vae(components, dtype=compute).to(device).requires_grad_(False)  # type: ignore[arg-type]
    teacher = load_network(teacher_from, dtype=compute, device=device)
    prompts = [chain[0] for chain in read_chains(prompts_from)[: config.num_pairs]]
    embed, negative = _embeddings(config, prompts, components, teacher, world, device)
    stride = settings_of(vae).scale_factor_spatial
    shape = (config.clip_frames, teacher.config.in_dim, config.height // stride, config.width // stride)
    keep = [config.num_steps * (1000 - step) // 1000 for step in config.denoising_steps] + [config.num_steps]
    solution = {"num_steps": config.num_steps, "keep": keep, "shift": config.timestep_shift}
    made_with = {"teacher": teacher_from, "guidance_scale": config.guidance_scale, "seed": run.seed, "shape": shape, **solution}
    pairs = OdePairs(config.pairs, prompts, made_with)
    pairs.make(
        lambda batch: Denoiser(teacher, guidance_scale=config.guidance_scale, negative=negative.expand(batch, -1, -1)),
        embed,
        shape,
        seed=run.seed,
        batch=config.batch,
        rank=world.rank,
        size=world.size,
        **solution,
    )
    barrier(world)
    network = load_network(config.student or teacher_from, device=device)
    timesteps, window = warp_steps(config.denoising_steps, config.timestep_shift), Window.of(config.window, config.sink)
    return OdeInitStage(
        config,
        ODERegression(network, block=config.block, window=window, timesteps=timesteps, clean_history=config.clean_history),
        _trained(network, config, config.lr, Sharding(param_dtype=compute)),
        pairs,
        embed=embed,
        generator=rank_generator(run.seed, world.rank),
        validate=_preview(run, config, [PromptSchedule.single(p) for p in prompts[: config.validation_videos]], vae, embed, world),
        world=world,
    )


def _tuner(
    run: TrainConfig,
    config: DistillationConfig,
    network: WanTransformer,
    vae: AutoencoderKLWan,
    embed: Embed,
    chains: list[Chain],
    generator: torch.Generator,
    world: World,
    device: torch.device,
) -> StreamingTuner:
    stride, window = settings_of(vae).scale_factor_spatial, Window.of(config.window, config.sink)
    size = (config.height // stride, config.width // stride)

    def noise(frames: int) -> Latents:  # drawn on the CPU, the same for every device; pinned, so that the host need not wait for a GPU
        shape = (config.batch, frames, network.config.in_dim, *size)
        return torch.randn(shape, generator=generator, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    rollout = Rollout(
        Denoiser(network),
        history_cache(network, *size, window=window, batch=config.batch, slots=window.visible + config.clip_frames - config.overlap),
        FewStep(warp_steps(config.denoising_steps, config.timestep_shift), lambda latents: noise(latents.shape[1])),
        context_t=config.context_timestep,
    )
    return StreamingTuner(
        rollout,
        PromptSampler(chains, batch=config.batch, seed=run.seed, rank=world.rank, size=world.size),
        embed=embed,
        noise=noise,
        choices=SharedChoices(run.seed, world),
        block=config.block,
        clip_frames=config.clip_frames,
        overlap=config.overlap,
        max_frames=config.max_frames,
        switch_at=config.switch_at,
        num_switches=config.num_switches,
        transition=Transition(config.keep_sink, config.recache),
        anchor=partial(anchor_frame, vae, context=config.anchor_context),
    )


def _schedules(config: DistillationConfig, chains: list[Chain]) -> list[PromptSchedule]:
    """What validation videos show: the scripts of a file, or the first prompts of the data, switching after equal parts if they can.

    With an oracle that judges them, without a file: combinations of the miniature's world that are kept for validation.
    """
    if config.validation_prompts is not None:
        scripts = read_scripts(config.validation_prompts)[: config.validation_videos]
        return [script.schedule(Timing(block=config.block)) for script in scripts]
    blocks = config.validation_frames // config.block
    if config.oracle:
        return miniature_schedules(
            config.validation_videos, switch_at=config.block * (blocks // 2) if config.switch_at and blocks > 1 else None
        )
    schedules = []
    for chain in chains[: config.validation_videos]:
        prompts = chain[: min(config.num_switches + 1, blocks)] if config.switch_at and blocks > 1 else chain[:1]
        starts = [config.block * (blocks * number // len(prompts)) for number in range(1, len(prompts))]
        schedules.append(PromptSchedule.at_latent_frames(prompts, starts))
    return schedules


def _preview(
    run: TrainConfig,
    config: DistillationConfig | OdeConfig,
    schedules: Sequence[PromptSchedule],
    vae: AutoencoderKLWan,
    embed: Embed,
    world: World,
) -> Preview:
    return Preview(
        schedules,
        vae,
        embed,
        window=Window.of(config.window, config.sink),
        block=config.block,
        steps=warp_steps(config.denoising_steps, config.timestep_shift),
        num_latent_frames=config.validation_frames,
        height=config.height,
        width=config.width,
        transition=Transition(config.keep_sink, config.recache) if isinstance(config, DistillationConfig) else Transition(),
        context_t=config.context_timestep if isinstance(config, DistillationConfig) else 0.0,
        seed=run.seed,
        batch=16 if config.oracle else 1,  # the miniature's videos are small
        measure=read_by_oracle if config.oracle else None,
        write=world.is_main,
    )
