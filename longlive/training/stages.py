"""From settings to a stage of training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.window import Window
from longlive.checkpoints import store
from longlive.config import AutoencoderConfig, CausalInitConfig, DistillationConfig, OdeConfig, TeacherConfig, TrainConfig
from longlive.engine.low_precision import cpu_has_bfloat16, use_bfloat16_linears
from longlive.engine.sharding import shard
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.dimensions import Timing
from longlive.generation.memory import history_cache
from longlive.generation.prompt_files import read_scripts
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.models.text import TextEncoder
from longlive.models.vae import decoder_width, set_spatial_padding, settings_of
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments
from longlive.ops.flow_matching import warp_steps
from longlive.parallel.world import SharedChoices, World, choose_dtype, gather, rank_generator
from longlive.training.clips import Embed, StreamingTuner, anchor_frame
from longlive.training.distillation import DistillationStage
from longlive.training.dmd import DMD
from longlive.training.ema import EMA
from longlive.training.embeddings import TextEmbeddings, fingerprint
from longlive.training.miniature.autoencoder import AutoencoderStage, deepened, new_vae, with_new_decoder
from longlive.training.miniature.causal_init import CausalInitStage
from longlive.training.miniature.language import LanguageStage
from longlive.training.miniature.teacher import TeacherStage
from longlive.training.networks import Learner, load_network
from longlive.training.ode import ODERegression
from longlive.training.ode_init import OdeInitStage
from longlive.training.ode_pairs import OdePairs
from longlive.training.prompts import PromptPair, PromptSampler, read_pairs
from longlive.training.trainer import Kind, Stage, hash_of, one_cycle
from longlive.training.validation import Preview, read_by_oracle
from longlive.types import Latents, Text


class Built(NamedTuple):
    """A stage, what it trains, and the hash of the weights that it cannot do without (adapters: those under them)."""

    stage: Stage
    kind: Kind = "full"
    base: str | None = None


def build(config: TrainConfig, world: World, device: torch.device) -> Built:
    """The stage that `config.stage` names, with new weights drawn from `config.seed`.

    Raises:
        ValueError, FileNotFoundError: for a setting or a file that is missing or does not fit.
    """
    torch.manual_seed(config.seed)  # initial weights; everything else draws from the stage's own generators
    if config.stage == "language":
        return Built(LanguageStage(steps=config.steps, batch=config.language.batch, lr=config.language.lr, seed=config.seed))
    if config.stage == "autoencoder":
        return Built(_autoencoder(config, config.autoencoder))
    if config.stage == "teacher":
        return Built(_teacher(config, config.teacher))
    if config.stage == "causal_init" and config.causal_init.objective == "ode":
        return Built(_ode_init(config, config.ode, world, device))
    if config.stage == "causal_init":
        return Built(_causal_init(config, config.causal_init))
    return _distillation(config, config.init if config.stage == "init" else config.long, world, device)


def _autoencoder(config: TrainConfig, settings: AutoencoderConfig) -> AutoencoderStage:
    if settings.initial is None and settings.decoder_only:
        raise ValueError("autoencoder.decoder_only needs an encoder that is trained: autoencoder.initial=FOLDER")
    vae = new_vae(settings) if settings.initial is None else store.load_vae(settings.initial).train()
    if settings.decoder_dim is not None and settings.decoder_dim != decoder_width(vae):
        if not settings.decoder_only:
            raise ValueError(
                f"the decoder in {settings.initial} is {decoder_width(vae)} wide; a new one needs autoencoder.decoder_only=true"
            )
        vae = with_new_decoder(vae, settings.decoder_dim)
    if settings.num_res_blocks > settings_of(vae).num_res_blocks:
        vae = deepened(vae, settings.num_res_blocks)
    set_spatial_padding(vae, settings.spatial_padding)
    z_dim = settings_of(vae).z_dim
    if not settings.decoder_only:
        vae.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)  # measured at the end of training
    return AutoencoderStage(
        vae,
        batch=settings.batch,
        steps=config.steps,
        lr=settings.lr,
        seed=config.seed,
        decoder_only=settings.decoder_only,
        kl_weight=settings.kl_weight,
        latent_noise=settings.latent_noise,
        subject_weight=settings.subject_weight,
        edge_weight=settings.edge_weight,
        gradient_weight=settings.gradient_weight,
        hard=settings.hard,
        hard_weight=settings.hard_weight,
        reset=settings.reset,
        stream_from=settings.stream_from,
        images_per_chunk=settings.images_per_chunk,
    )


def _miniature_parts(settings: CausalInitConfig | TeacherConfig, stage: str) -> tuple[WanTransformer, AutoencoderKLWan, TextEncoder]:
    """Transformer in training, and the earlier stages' exports, frozen."""
    for earlier, folder in (("language", settings.language), ("autoencoder", settings.autoencoder)):
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder} does not exist; run configs/miniature/{earlier}.yaml first, or say where its export is: {stage}.{earlier}=…"
            )
    encoder, tokenizer = store.load_text_encoder(settings.language)
    if settings.initial is None:
        network = WanTransformer(**arguments(settings.size))
    else:
        network = load_network(settings.initial).requires_grad_(True)
    vae = store.load_vae(settings.autoencoder).requires_grad_(False)
    return network, vae, TextEncoder(encoder, tokenizer, text_len=network.config.text_len)


def _teacher(config: TrainConfig, settings: TeacherConfig) -> TeacherStage:
    network, vae, text_encoder = _miniature_parts(settings, "teacher")
    return TeacherStage(
        network,
        vae,
        text_encoder,
        Path(config.run),
        steps=config.steps,
        lr=settings.lr,
        seed=config.seed,
        clip_frames=settings.clip_frames,
        clip_batch=settings.clip_batch,
        clip_every=settings.clip_every,
        short_frames=settings.short_frames,
        short_batch=settings.short_batch,
        num_clips=settings.num_clips,
        num_shorts=settings.num_shorts,
        phrasings=settings.phrasings,
        shift=settings.timestep_shift,
        ema_decay=settings.ema_decay,
        bfloat16=_bfloat16_linears(settings.bfloat16),
        hard=settings.hard,
        hard_weight=settings.hard_weight,
    )


def _causal_init(config: TrainConfig, settings: CausalInitConfig) -> CausalInitStage:
    network, vae, text_encoder = _miniature_parts(settings, "causal_init")
    return CausalInitStage(
        network,
        vae,
        text_encoder,
        Path(config.run),
        steps=config.steps,
        lr=settings.lr,
        seed=config.seed,
        clip_batch=settings.clip_batch,
        first_batch=settings.first_batch,
        num_videos=settings.num_videos,
        num_first_videos=settings.num_first_videos,
        phrasings=settings.phrasings,
        block=settings.block,
        window=Window.of(settings.window, settings.sink),
        shift=settings.timestep_shift,
        first_shift=settings.first_shift,
        history_sigma=settings.history_sigma,
        max_position=settings.max_position,
        denoising_steps=settings.denoising_steps,
        ema_decay=settings.ema_decay,
        clip_every=settings.clip_every,
        bfloat16=_bfloat16_linears(settings.bfloat16),
        hard=settings.hard,
        hard_weight=settings.hard_weight,
    )


def _distillation(config: TrainConfig, settings: DistillationConfig, world: World, device: torch.device) -> Built:
    """Generator, critic and teacher, the data, and the tuner that makes videos."""
    wanted = {"generator": settings.generator, "teacher": settings.teacher, "components": settings.components, "prompts": settings.prompts}
    _given(config.stage, f"train_{config.stage}", **wanted)
    generator_from, teacher_from, components, prompts = (str(value) for value in wanted.values())
    compute = choose_dtype("auto", device)
    vae = store.load_vae(components, dtype=compute).to(device).requires_grad_(False)  # type: ignore[arg-type]
    network = load_network(generator_from, lora=settings.generator_lora, device=device)
    base = hash_of(network.state_dict()) if settings.lora_rank is not None else None
    critic_network = load_network(settings.critic or teacher_from, device=device)
    teacher = load_network(teacher_from, dtype=compute, device=device)
    pairs = read_pairs(prompts, settings.switch_prompts)
    schedules = _schedules(settings, pairs)
    texts = [prompt for pair in pairs for prompt in pair if prompt is not None] + [cue.prompt for plan in schedules for cue in plan.cues]
    embed, negative = _embeddings(settings.embeddings, texts, components, network, settings.negative_prompt, world, device)

    average = EMA(network, decay=settings.ema_decay, warm_up=False) if settings.ema_decay and settings.lora_rank is None else None
    learners = [
        Learner(
            trained,
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            checkpointing=settings.checkpointing,
            compute=compute,
        )
        for trained, lr in ((network, settings.lr), (critic_network, settings.critic_lr))
    ]
    for frozen in (teacher, *([average.average] if average else [])):
        shard(frozen, param_dtype=compute, reduce_dtype=torch.float32)
    if _bfloat16_linears(settings.bfloat16_linears):
        for one in (network, critic_network, teacher):
            use_bfloat16_linears(one)
    random = {name: rank_generator(config.seed + n, world.rank) for n, name in enumerate(("noise", "levels"), 1)}
    tuner = _tuner(config, settings, network, vae, embed, pairs, random["noise"], world, device)
    stage = DistillationStage(
        tuner,
        DMD(
            Denoiser(teacher),
            Denoiser(critic_network),
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            shift=settings.timestep_shift,
        ),
        *learners,
        negative=negative.expand(settings.batch, -1, -1),
        random=random,
        validate=_preview(config, settings, schedules, vae, embed, world),
        world=world,
        average=average,
        ema_start=settings.ema_start,
        ratio=settings.ratio,
        accumulate=settings.accumulate,
        max_norm=settings.max_norm,
        rate=partial(one_cycle, steps=config.steps, warmup=0) if settings.lr_schedule == "cosine" else lambda number: 1.0,
    )
    return Built(stage, "full" if settings.lora_rank is None else "lora", base)


def _bfloat16_linears(wanted: bool | None) -> bool:
    """A setting's value; None stands for what the CPU is good at."""
    return cpu_has_bfloat16() if wanted is None else wanted


def _given(stage: str, file: str, **wanted: str | None) -> None:
    """Raises ValueError for the first setting that has no default and no value."""
    for name, value in wanted.items():
        if value is None:
            raise ValueError(f"{stage}.{name} is not set; see configs/{file}.yaml")


def _embeddings(
    folder: str,
    prompts: Sequence[str],
    components: str,
    network: WanTransformer,
    negative_prompt: str | None,
    world: World,
    device: torch.device,
) -> tuple[Embed, Text]:
    """Embeddings of all `prompts`, computed once, after which the encoder is let go; and that of the negative prompt, `[1, L, E]`."""
    encoder, tokenizer = store.load_text_encoder(components, dtype=choose_dtype("auto", device))
    text_encoder = TextEncoder(encoder, tokenizer, text_len=network.config.text_len, device=device)
    known = TextEmbeddings(folder, text_encoder.encode, name=fingerprint(text_encoder))
    known.prepare(prompts[world.rank :: world.size], batch=16)
    gather(None, world)  # wait for the others' shares
    negative = torch.zeros(1, text_encoder.text_len, text_encoder.width)
    if negative_prompt is not None:
        negative = known([negative_prompt])
    known.encode = None
    return lambda texts: known(texts).to(device), negative.to(device)


def _ode_init(config: TrainConfig, settings: OdeConfig, world: World, device: torch.device) -> OdeInitStage:
    """Makes the pairs that are missing, then the stage that learns from them."""
    _given("ode", "train_ode", teacher=settings.teacher, components=settings.components, prompts=settings.prompts)
    assert settings.teacher is not None and settings.components is not None and settings.prompts is not None
    compute = choose_dtype("auto", device)
    vae = store.load_vae(settings.components, dtype=compute).to(device).requires_grad_(False)  # type: ignore[arg-type]
    teacher = load_network(settings.teacher, dtype=compute, device=device)
    pairs = read_pairs(settings.prompts)[: settings.num_pairs]
    prompts = [pair.prompt for pair in pairs]
    embed, negative = _embeddings(settings.embeddings, prompts, settings.components, teacher, settings.negative_prompt, world, device)
    stride = settings_of(vae).scale_factor_spatial
    shape = (settings.clip_frames, teacher.config.in_dim, settings.height // stride, settings.width // stride)
    keep = [round(settings.num_steps * (1000 - step) / 1000) for step in settings.denoising_steps] + [settings.num_steps]
    solution = {"num_steps": settings.num_steps, "keep": keep, "shift": settings.timestep_shift}
    about = {"teacher": settings.teacher, "guidance_scale": settings.guidance_scale, "seed": config.seed, "shape": shape, **solution}
    known = OdePairs(settings.pairs, prompts, about)
    known.make(
        lambda batch: Denoiser(teacher, guidance_scale=settings.guidance_scale, negative=negative.expand(batch, -1, -1)),
        embed,
        shape,
        seed=config.seed,
        batch=settings.batch,
        rank=world.rank,
        size=world.size,
        **solution,
    )
    gather(None, world)
    network = load_network(settings.student or settings.teacher, device=device)
    student = Learner(
        network,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        checkpointing=settings.checkpointing,
        compute=compute,
    )
    levels = warp_steps(settings.denoising_steps, settings.timestep_shift)
    window = Window.of(settings.window, settings.sink)
    return OdeInitStage(
        ODERegression(network, block=settings.block, window=window, levels=levels, clean_history=settings.clean_history),
        student,
        known,
        embed=embed,
        blocks=settings.clip_frames // settings.block,
        batch=settings.batch,
        max_norm=settings.max_norm,
        draw=rank_generator(config.seed, world.rank),
        validate=_preview(config, settings, [PromptSchedule.single(p) for p in prompts[: settings.validation_videos]], vae, embed, world),
        world=world,
    )


def _tuner(
    config: TrainConfig,
    settings: DistillationConfig,
    network: WanTransformer,
    vae: AutoencoderKLWan,
    embed: Embed,
    pairs: list[PromptPair],
    draw: torch.Generator,
    world: World,
    device: torch.device,
) -> StreamingTuner:
    window = Window.of(settings.window, settings.sink)
    stride = settings_of(vae).scale_factor_spatial
    size = (settings.height // stride, settings.width // stride)

    def noise(frames: int) -> Latents:  # drawn on the CPU, the same for every device; pinned, so that a GPU need not be waited for
        shape = (settings.batch, frames, network.config.in_dim, *size)
        return torch.randn(shape, generator=draw, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    rollout = Rollout(
        Denoiser(network),
        history_cache(network, *size, window=window, batch=settings.batch, rows=2 * window.visible + settings.clip_frames),
        FewStep(warp_steps(settings.denoising_steps, settings.timestep_shift), lambda latents: noise(latents.shape[1])),
        context_t=settings.context_timestep,
    )
    return StreamingTuner(
        rollout,
        PromptSampler(pairs, batch=settings.batch, seed=config.seed, rank=world.rank, size=world.size),
        embed=embed,
        noise=noise,
        choices=SharedChoices(config.seed, world),
        block=settings.block,
        clip_frames=settings.clip_frames,
        overlap=settings.overlap,
        max_frames=settings.max_frames,
        switch_at=settings.switch_at,
        transition=Transition(settings.keep_sink, settings.recache),
        anchor=partial(anchor_frame, vae, tail=settings.anchor_tail),
    )


def _schedules(settings: DistillationConfig, pairs: list[PromptPair]) -> list[PromptSchedule]:
    """What validation videos show: the scripts of a file, or the first prompts of the data, with a switch half-way if they have one."""
    if settings.validation_prompts is not None:
        scripts = read_scripts(settings.validation_prompts)[: settings.validation_videos]
        return [script.schedule(Timing(block=settings.block)) for script in scripts]
    middle = settings.validation_frames // settings.block // 2 * settings.block
    schedules = []
    for pair in pairs[: settings.validation_videos]:
        if settings.switch_at and pair.switch is not None and middle > 0:
            schedules.append(PromptSchedule.at_latent_frames([pair.prompt, pair.switch], [middle]))
        else:
            schedules.append(PromptSchedule.single(pair.prompt))
    return schedules


def _preview(
    config: TrainConfig,
    settings: DistillationConfig | OdeConfig,
    schedules: Sequence[PromptSchedule],
    vae: AutoencoderKLWan,
    embed: Embed,
    world: World,
) -> Preview:
    return Preview(
        schedules,
        vae,
        embed,
        window=Window.of(settings.window, settings.sink),
        block=settings.block,
        steps=warp_steps(settings.denoising_steps, settings.timestep_shift),
        num_latent_frames=settings.validation_frames,
        height=settings.height,
        width=settings.width,
        transition=Transition(settings.keep_sink, settings.recache) if isinstance(settings, DistillationConfig) else Transition(),
        context_t=settings.context_timestep if isinstance(settings, DistillationConfig) else 0.0,
        seed=config.seed,
        measure=read_by_oracle if settings.oracle else None,
        write=world.is_main,
    )
