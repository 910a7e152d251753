"""Tiny diffusers models with random weights; importing diffusers takes seconds, so once."""

import torch


def randomised(network):
    """The network with its zero-initialised weights drawn at random, in evaluation mode."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0, 0.1)
    return network.eval()


def autoencoder(diffusers):
    return diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def stable_diffusion_3(diffusers):
    """Latents (B, 4, 8, 8), prompts (B, L, 16), pooled (B, 16)."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=randomised(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(diffusers),
        **{name: None for i in ("", "_2", "_3") for name in (f"text_encoder{i}", f"tokenizer{i}")},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(diffusers):
    """Latents (B, 16, 16) as packed tokens, prompts (B, L, 32), pooled (B, 32)."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    pipe = diffusers.FluxPipeline(
        transformer=randomised(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(diffusers),
        **{name: None for i in ("", "_2") for name in (f"text_encoder{i}", f"tokenizer{i}")},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet(diffusers, **options):
    """States (B, 1, 8, 8)."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def qwen_image(diffusers):
    """States (B, 16, 4), prompts (B, L, 16)."""
    torch.manual_seed(0)
    return randomised(
        diffusers.QwenImageTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
    )


def sana(diffusers):
    """States (B, 4, 8, 8), outputs of 8 channels, prompts (B, L, 16)."""
    torch.manual_seed(0)
    return randomised(
        diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            patch_size=1,
            timestep_scale=0.5,
        )
    )


def lumina2(diffusers):
    """States (B, 4, 8, 8), prompts (B, L, 16)."""
    torch.manual_seed(0)
    return randomised(
        diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=1,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(64, 64, 64),
            cap_feat_dim=16,
        )
    )


def z_image(diffusers):
    """States (B, 4, 8, 8), captions (B, L, 16)."""
    torch.manual_seed(0)
    return randomised(
        diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[64, 64, 64],
        )
    )
