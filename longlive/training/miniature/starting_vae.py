"""The autoencoder that training starts from: new, of a folder as it is, or grown from one without losing what it has learned."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from longlive.checkpoints import store
from longlive.config import AutoencoderConfig
from longlive.models.vae import decoder_width, set_spatial_padding, settings_of, spatial_padding


def starting_vae(config: AutoencoderConfig) -> AutoencoderKLWan:
    """The autoencoder that the settings describe.

    Raises:
        ValueError: for a decoder that is to be trained alone, or to be replaced by a new one, without an encoder that stays.
    """
    if config.initial is None:
        if config.decoder_only:
            raise ValueError("autoencoder.decoder_only needs an encoder that is trained: autoencoder.initial=FOLDER")
        vae = _new(config)
    else:
        vae = store.load_vae(config.initial).train()
    if config.decoder_dim is not None and config.decoder_dim != decoder_width(vae):
        if not config.decoder_only:
            raise ValueError(f"the decoder in {config.initial} is {decoder_width(vae)} wide; a new one needs autoencoder.decoder_only=true")
        vae = with_new_decoder(vae, config.decoder_dim)
    if config.num_res_blocks > settings_of(vae).num_res_blocks:
        vae = deepened(vae, config.num_res_blocks)
    set_spatial_padding(vae, config.spatial_padding)
    if not config.decoder_only:  # measured at the end of training
        z_dim = settings_of(vae).z_dim
        vae.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
    return vae


def _new(config: AutoencoderConfig) -> AutoencoderKLWan:
    """Random weights of the settings' sizes, for 2 x 2 pixels of 3 colours as 12 channels."""
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.decoder_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        z_dim=config.z_dim,
        temperal_downsample=[True] * (len(config.dim_mult) - 1),
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=2 ** len(config.dim_mult),
    )
    assert isinstance(vae, AutoencoderKLWan)
    return vae


def deepened(vae: AutoencoderKLWan, num_res_blocks: int) -> AutoencoderKLWan:
    """The same function with `num_res_blocks` residual blocks per level; those that are added start as the identity."""
    deeper = _resized(vae, num_res_blocks=num_res_blocks)
    for name in deeper.load_state_dict(vae.state_dict(), strict=False).missing_keys:
        if ".conv2." in name:
            torch.nn.init.zeros_(deeper.get_parameter(name))
    return deeper


def with_new_decoder(vae: AutoencoderKLWan, width: int) -> AutoencoderKLWan:
    """The same encoder and latents with a decoder `width` channels wide, from random weights."""
    wider = _resized(vae, decoder_base_dim=width)
    wider.encoder.load_state_dict(vae.encoder.state_dict())
    wider.quant_conv.load_state_dict(vae.quant_conv.state_dict())
    return wider


def _resized(vae: AutoencoderKLWan, **sizes: int) -> AutoencoderKLWan:
    """Random weights of other sizes, with the latents' statistics and the padding of `vae`."""
    before = {name: value for name, value in settings_of(vae).items() if name != "spatial_padding"}  # which diffusers does not know
    made = AutoencoderKLWan.from_config(before | sizes)
    assert isinstance(made, AutoencoderKLWan)
    set_spatial_padding(made, spatial_padding(vae))
    return made.train()
