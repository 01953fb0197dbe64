"""Makes cogvideox_vae.safetensors from the model of the golden case vae-cogvideox, in float32 on the CPU.

    python cogvideox_vae.py ../../../vectors/models/vae-cogvideox      (torch 2.15, diffusers 0.42.1)
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
config = AutoencoderKLCogVideoX.load_config(folder)
model = AutoencoderKLCogVideoX.from_config(config)
weights = load_file(folder / "model.safetensors")
model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
model.eval()


def decode(latents):
    with torch.no_grad():
        return model.decode(latents / model.config.scaling_factor).sample


golden = load_file(folder / "io.safetensors")
error = (decode(golden["in.latents"]) - golden["out.sample"]).norm() / golden["out.sample"].norm()
assert error < 1e-5, error

saved = {}
generator = torch.Generator().manual_seed(7)
for name, shape, frames, tiled in [
    ("one", [1, 6, 1, 3, 2], [0], False),
    ("even", [1, 6, 4, 2, 3], [0, 7, 8, 15], False),
    ("tiled", [1, 6, 4, 5, 4], [0, 8, 15], True),
    ("tiled_one", [2, 6, 1, 7, 2], [0], True),
]:
    latents = torch.randn(shape, generator=generator)
    if tiled:
        model.enable_tiling(32, 24, 1 / 4, 1 / 3)
    else:
        model.disable_tiling()
    video = decode(latents)
    print(name, list(video.shape))
    saved[f"{name}.latents"] = latents
    saved[f"{name}.frames"] = video[:, :, frames].contiguous()
save_file(saved, Path(__file__).with_suffix(".safetensors"))
