"""Makes hunyuanvideo_vae.safetensors from the model of the golden case vae-hunyuan-video, in float32 on the CPU.

    python hunyuanvideo_vae.py ../../../vectors/models/vae-hunyuan-video      (torch 2.15, diffusers 0.42.1)
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def decode(latents, **tiles):
    model = AutoencoderKLHunyuanVideo.from_config(AutoencoderKLHunyuanVideo.load_config(folder))
    model.load_state_dict(weights)
    model.eval()
    if tiles:
        model.enable_tiling(**tiles)
    with torch.no_grad():
        return model.decode(latents / model.config.scaling_factor).sample


golden = load_file(folder / "io.safetensors")
error = (decode(golden["in.latents"]) - golden["out.sample"]).norm() / golden["out.sample"].norm()
assert error < 1e-5, error

space = {
    "tile_sample_min_height": 32,
    "tile_sample_stride_height": 24,
    "tile_sample_min_width": 24,
    "tile_sample_stride_width": 16,
}
time = {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4}
saved = {}
generator = torch.Generator().manual_seed(7)
for name, shape, frames, tiles in [
    ("one", [1, 8, 1, 3, 2], [0], {}),
    ("time", [1, 8, 7, 2, 3], [0, 12, 13, 14, 16, 17, 24], {}),
    ("space", [2, 8, 2, 5, 4], [0, 4], space),
    ("both", [1, 8, 5, 7, 4], [0, 4, 5, 7, 8, 9, 16], {**space, **time}),
    ("wide", [1, 8, 1, 2, 5], [0], {**space, **time}),
]:
    latents = torch.randn(shape, generator=generator)
    video = decode(latents, **tiles)
    print(name, list(video.shape))
    saved[f"{name}.latents"] = latents
    saved[f"{name}.frames"] = video[:, :, frames].contiguous()
save_file(saved, Path(__file__).with_suffix(".safetensors"))
