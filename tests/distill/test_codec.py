"""Codecs: exact round trips, grey images through a colour autoencoder, refusals."""

import pytest
import torch

from otdd.distill.codec import AutoencoderCodec, PixelCodec, codec_from_config, import_diffusers


def autoencoder() -> AutoencoderCodec:
    torch.manual_seed(0)
    vae = import_diffusers().AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    return AutoencoderCodec(vae, batch_size=2)


def test_pixels_are_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    latents = PixelCodec().encode(images)
    assert latents.min() == -1
    assert latents.max() == 1
    assert torch.equal(PixelCodec().decode(latents), images)
    assert PixelCodec().decode(torch.full((1, 1, 1, 1), 7.0)).item() == 255


def test_autoencoder_scales_batches_and_keeps_grey():
    codec = autoencoder()
    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    latents = codec.encode(images)
    assert latents.shape == (5, *codec.latent_shape((1, 16, 16))) == (5, 4, 8, 8)
    whole = codec.vae.encode(images.expand(-1, 3, -1, -1).float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(latents, whole * 0.18215, rtol=1e-4, atol=1e-5)
    decoded = codec.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.uint8
    with pytest.raises(ValueError, match="do not divide"):
        codec.latent_shape((3, 15, 16))


def test_codecs_are_rebuilt_from_their_files():
    for codec in (PixelCodec(), autoencoder()):
        again = codec_from_config(codec.config(), codec.tensors())
        images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
        torch.testing.assert_close(again.encode(images), codec.encode(images))
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        codec_from_config({"kind": "zip"}, {})


@pytest.mark.parametrize("codec", [PixelCodec(), autoencoder()])
def test_refusals(codec):
    with pytest.raises(ValueError, match="images must be uint8"):
        codec.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="NaN or infinity"):
        codec.decode(torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="latents must be floating"):
        codec.decode(torch.zeros(4, 8, 8))
