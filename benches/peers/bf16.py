#!/usr/bin/env python3
"""What bf16 costs PyTorch on the golden vectors: the error of each model's outputs, in the 2-norm, against those in f32.

    bf16.py [--device cuda] [CASE ...]      CASE is a folder below vectors/; all models that are built here by default

Prints a line for each, `CASE ERROR (OUTPUT)`, the worst output of each, as `MMGP_TEST_DTYPE=bf16` has the test
`vectors` do. Needs torch, diffusers and transformers."""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2] / "vectors"
CASES = (
    "core/clip-text core/clip-text-projection core/flux-dev core/flux-schnell core/t5 core/vae-decode core/vae-encode "
    "core/vae-sd-decode core/vae-sd-encode models/cogvideox-2b models/cogvideox-5b models/hunyuan-video models/llama "
    "models/vae-cogvideox models/vae-hunyuan-video"
).split()


def made(about, folder, device):
    if about["library"].startswith("transformers"):
        import transformers

        model = getattr(transformers, about["class"]).from_pretrained(folder, dtype=torch.bfloat16)
        return model.to(device).eval()
    import diffusers

    config = json.loads((folder / "config.json").read_text())
    model = getattr(diffusers, about["class"]).from_config(config)
    weights = {k: v.to(torch.float32) for k, v in load_file(folder / "model.safetensors").items()}
    missing, _ = model.load_state_dict(weights, strict=False)
    # But for tables that are computed.
    if missing := [name for name in missing if "pos_embed" not in name]:
        raise SystemExit(f"{folder}: weights are missing: {missing[:3]}")
    return model.to(device, torch.bfloat16).eval()


def outputs(about, model, given, want):
    kind = about["kind"]
    if kind == "vae_decoder":
        z = given["latents"]
        config = model.config
        z = z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        return {"sample": model.decode(z).sample}
    if kind == "vae_encoder":
        moments = model.encode(given["sample"]).latent_dist
        return {"mean": moments.mean, "logvar": moments.logvar}
    if kind == "text_encoder":
        masked = {name.removesuffix("_masked") for name in want if name.endswith("_masked")}
        mask = given.pop("attention_mask", None)
        found = {}
        for tail in ("", "_masked") if masked else ("",):
            use = {} if masked and not tail else {"attention_mask": mask}
            out = model(**given, **{k: v for k, v in use.items() if v is not None}, output_hidden_states=True)
            found["last_hidden_state" + tail] = out.last_hidden_state
            found["penultimate_hidden_state"] = out.hidden_states[-2]
            for name in want:
                if name.startswith("hidden_states."):
                    found[name] = out.hidden_states[int(name.split(".")[1])]
                    # Theirs too are zeros where padding is.
                    found["last_hidden_state"] = out.last_hidden_state * mask.unsqueeze(2)
                    found[name] = found[name] * mask.unsqueeze(2)
            for name in ("pooler_output", "text_embeds"):
                if getattr(out, name, None) is not None:
                    found[name] = getattr(out, name)
        return found
    if "image_rotary_emb.cos" in given:
        given["image_rotary_emb"] = (given.pop("image_rotary_emb.cos"), given.pop("image_rotary_emb.sin"))
    return {"sample": model(**given).sample}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for case in args.cases:
        folder = ROOT / case
        about = json.loads((folder / "case.json").read_text())
        io = load_file(folder / "io.safetensors")
        want = {name[4:]: t for name, t in io.items() if name.startswith("out.")}
        # Times, positions and guidance stay what they are; the rest is what a pipeline in bf16 gives.
        kept = ("timestep", "guidance", "img_ids", "txt_ids", "image_rotary_emb.cos", "image_rotary_emb.sin")
        given = {}
        for name, t in io.items():
            if name.startswith("in."):
                t = t.to(args.device)
                half = t.is_floating_point() and name[3:] not in kept
                given[name[3:]] = t.to(torch.bfloat16) if half else t
        with torch.no_grad():
            found = outputs(about, made(about, folder, args.device), given, want)
        errors = {}
        for name, t in found.items():
            if name in want:
                right = want[name].double()
                errors[name] = ((t.cpu().double() - right).norm() / right.norm()).item()
        worst = max(errors, key=errors.get)
        print(f"{case:32} {errors[worst]:.2e} ({worst})", flush=True)


main()
