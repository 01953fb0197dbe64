#!/usr/bin/env python3
"""A denoising step of a video transformer in diffusers with group offloading by block: random weights in bf16 of the
published shape, the command's size and frames, on the card. Prints one JSON object.

    pip install torch diffusers==0.42.1 accelerate
    python video.py cogvideox-5b [--steps 2] [--width W --height H --frames F]
"""
import argparse
import json
import time

import diffusers
import torch
from accelerate import init_empty_weights

SIZES = {"cogvideox-5b": (720, 480, 49), "hunyuanvideo": (960, 544, 61)}


def cogvideox(width, height, frames):
    with init_empty_weights():
        model = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
        )
    shape = (2, (frames - 1) // 4 + 1, 16, height // 8, width // 8)
    grid = (shape[1], height // 16, width // 16)
    angles = diffusers.models.embeddings.get_3d_rotary_pos_embed(
        64, ((0, 0), grid[1:]), grid[1:], grid[0], device="cuda"
    )

    # The two samples of guidance are one batch, as in the pipeline.
    def inputs():
        return {
            "hidden_states": torch.randn(shape, device="cuda", dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(2, 226, 4096, device="cuda", dtype=torch.bfloat16),
            "timestep": torch.tensor([500, 500], device="cuda"),
            "image_rotary_emb": angles,
        }

    return model, inputs


def hunyuanvideo(width, height, frames):
    with init_empty_weights():
        model = diffusers.HunyuanVideoTransformer3DModel()
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)

    def inputs():
        half = {"device": "cuda", "dtype": torch.bfloat16}
        return {
            "hidden_states": torch.randn(shape, **half),
            "timestep": torch.tensor([500.0], **half),
            "encoder_hidden_states": torch.randn(1, 256, 4096, **half),
            "encoder_attention_mask": torch.ones(1, 256, device="cuda", dtype=torch.int64),
            "pooled_projections": torch.randn(1, 768, **half),
            "guidance": torch.tensor([6000.0], **half),
        }

    return model, inputs


def fill(model):
    """Weights that keep the size of what flows through them, made on the card and kept on the host."""
    generator = torch.Generator("cuda").manual_seed(1)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else None
            values = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16, generator=generator)
            values = values / fan_in**0.5 if fan_in else torch.ones_like(values)
            setattr(module, name, torch.nn.Parameter(values.cpu(), requires_grad=False))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=SIZES)
    parser.add_argument("--steps", type=int, default=2)
    for side in ("width", "height", "frames"):
        parser.add_argument(f"--{side}", type=int)
    args = parser.parse_args()
    size = [own or usual for own, usual in zip((args.width, args.height, args.frames), SIZES[args.family])]
    begun = time.perf_counter()
    model, inputs = {"cogvideox-5b": cogvideox, "hunyuanvideo": hunyuanvideo}[args.family](*size)
    fill(model)
    model.eval()
    model.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=True,
    )
    loaded = time.perf_counter() - begun
    torch.cuda.reset_peak_memory_stats()
    times = []
    with torch.no_grad():
        for _ in range(1 + args.steps):
            given = inputs()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            out = model(**given, return_dict=False)[0]
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    steps = sorted(times[1:])
    print(
        json.dumps(
            {
                "system": f"diffusers {diffusers.__version__}, torch {torch.__version__}, group offload by block",
                "family": args.family,
                "form": "bf16",
                "width": size[0],
                "height": size[1],
                "frames": size[2],
                "load_s": loaded,
                "first_step_s": times[0],
                "step_s": steps[len(steps) // 2],
                "peak_vram_bytes": torch.cuda.max_memory_reserved(),
                "finite": bool(out.isfinite().all()),
                "card": torch.cuda.get_device_name(),
            }
        )
    )


main()
