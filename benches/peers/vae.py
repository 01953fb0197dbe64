#!/usr/bin/env python3
"""Decoding a picture with FLUX' autoencoder in PyTorch: random weights in bf16, on the card. Prints one JSON object.

    pip install torch diffusers==0.42.1
    python vae.py [--pixels 1024]
"""
import argparse
import json
import subprocess
import time

import diffusers
import torch


def used():
    """What is in use of the card as the driver's tool tells it, in bytes."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pixels", type=int, default=1024)
    pixels = parser.parse_args().pixels
    idle = used()
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        latents = torch.randn(1, 16, pixels // 8, pixels // 8, dtype=torch.bfloat16)
    model.encoder = None
    model = model.to(torch.bfloat16).eval()
    for channels_last in (False, True):
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            times = []
            with torch.no_grad():
                for _ in range(9):
                    torch.cuda.synchronize()
                    begun = time.perf_counter()
                    picture = model.decode(latents, return_dict=False)[0]
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - begun)
            print(
                json.dumps(
                    {
                        "system": f"diffusers {diffusers.__version__}, torch {torch.__version__}",
                        "channels_last": channels_last,
                        "cudnn_benchmark": benchmark,
                        "pixels": pixels,
                        "first_s": times[0],
                        "decode_s": sorted(times[2:])[3],
                        "times": times[2:],
                        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                        # The allocator keeps what it took, so that it is still in use now.
                        "peak_vram_bytes": used() - idle,
                        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                        "finite": bool(picture.isfinite().all()),
                        "card": torch.cuda.get_device_name(),
                    }
                ),
                flush=True,
            )


main()
