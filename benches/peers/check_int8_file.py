#!/usr/bin/env python3
"""Does a file that `mmgp convert --quantize` wrote open in other programs, with the same weights?

    cargo run --release -p mmgp-residency --example decode_int8 -- FILE.safetensors DENSE.safetensors
    python check_int8_file.py digest DENSE.safetensors > digests.json          # needs nothing
    python check_int8_file.py check FILE.safetensors CONFIG.json digests.json  # needs the programs

`check` opens a FLUX transformer with safetensors, loads it with quanto and with Python mmgp, run as
programs, and compares what each dequantizes to with the digests of ours, bit by bit.
"""
import hashlib
import json
import struct
import sys


def digest(path):
    with open(path, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        out = {}
        for name, info in header.items():
            if name != "__metadata__":
                start, end = info["data_offsets"]
                f.seek(8 + size + start)
                out[name] = hashlib.blake2b(f.read(end - start), digest_size=16).hexdigest()
    json.dump(out, sys.stdout, indent=0)


def check(path, config, digests):
    import torch
    from safetensors.torch import load_file, safe_open

    expected = json.load(open(digests))

    def compare(who, weights):
        same = 0
        for name, digest in expected.items():
            raw = weights[name].detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
            same += hashlib.blake2b(raw, digest_size=16).hexdigest() == digest
        print(f"{who}: {same} of {len(expected)} weights equal to the bit")
        return same == len(expected)

    def dequantized(model):
        layers = {n + ".weight": m for n, m in model.named_modules() if hasattr(m, "weight")}
        return {n: m.weight.dequantize() for n, m in layers.items() if n in expected}

    state = load_file(path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    print(f"safetensors: {len(state)} tensors, format {metadata['format']}")
    plain = {n: state[n + "._data"].to(state[n + "._scale"].dtype) * state[n + "._scale"] for n in expected}
    ok = compare("safetensors, data * scale", plain)

    from diffusers import FluxTransformer2DModel

    def empty():
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(json.load(open(config))).to(torch.bfloat16)

    from base64 import b64decode

    from optimum.quanto import requantize

    model = empty()
    requantize(model, state, json.loads(b64decode(metadata["quantization_map_base64"])), device=torch.device("cpu"))
    ok &= compare("quanto requantize", dequantized(model))

    from mmgp import offload

    model = empty()
    offload.load_model_data(model, path, verboseLevel=1)
    ok &= compare("mmgp load_model_data", dequantized(model))
    model = offload.fast_load_transformers_model(path, modelClass=FluxTransformer2DModel, verboseLevel=1)
    ok &= compare("mmgp fast_load_transformers_model", dequantized(model))
    return ok


if __name__ == "__main__":
    if sys.argv[1] == "digest":
        digest(sys.argv[2])
    else:
        sys.exit(0 if check(*sys.argv[2:5]) else 1)
