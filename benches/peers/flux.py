#!/usr/bin/env python3
"""Steps of a FLUX transformer in a Python system, one row in one process, over weights that `mmgp-gpu-bench` made.

    flux.py prepare --model DIR     the folder that diffusers reads: a config beside a link to the weights
    flux.py quantize --model DIR    mmgp's int8 file, which its int8 rows load
    flux.py run ROW --model DIR     loads, takes four steps, times six, and adds a line of JSON to --out

A step is one forward with the device waited for before and after. `compare.py` names the rows and calls this.
"""
import argparse
import json
import os
import re
import statistics
import sys
import threading
import time
import traceback
from importlib.metadata import version

WEIGHTS, INT8 = "diffusion_pytorch_model.safetensors", "transformer_quanto_int8.safetensors"
# Steps after the first that are not timed, as many as ours have.
WARM_UP = 3
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "mmgp", "optimum-quanto")


def rows():
    """What each row is made of."""
    found = {
        "pytorch": {"system": "PyTorch, eager", "how": "resident"},
        "pytorch_compiled": {"system": "PyTorch, compiled", "how": "resident", "compiled": True},
    }
    for kind in ("block", "leaf"):
        found[f"diffusers_{kind}"] = {"system": f"diffusers, group offload by {kind}", "how": "group", "kind": kind}
    for form in ("bf16", "int8"):
        for mib in (1200, 4000, 8000, 12000):
            for tail, told in (("", ""), ("_repaired", ", prefetch repaired")):
                found[f"mmgp_{form}_{mib}{tail}"] = {
                    "system": f"mmgp (Python), {mib} MiB{told}",
                    "how": "mmgp",
                    "form": form,
                    "mib": mib,
                    "repaired": bool(tail),
                }
    return found


class Sampler(threading.Thread):
    """The most of the card in use by all (NVML), every 20 ms; not while steps are timed."""

    def __init__(self):
        super().__init__(daemon=True)
        self.go, self.most, self.handle = threading.Event(), 0, None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no driver, or no binding of it: rows then have no peak
            pass
        self.idle = self.used()
        self.go.set()

    def used(self):
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used if self.handle else 0

    def run(self):
        while True:
            self.go.wait()
            self.most = max(self.most, self.used())
            time.sleep(0.02)

    def peak(self):
        """Over what was in use when the process began."""
        self.most = max(self.most, self.used())
        return self.most - self.idle if self.handle else None


class Bench:
    def __init__(self, args):
        import torch

        self.torch, self.args = torch, args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dense = os.path.join(args.model, "flux")
        self.int8 = os.path.join(args.model, "flux-int8", INT8)

    def wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def timed(self, call):
        self.wait()
        begun = time.perf_counter()
        made = call()
        self.wait()
        return time.perf_counter() - begun, made

    def median(self, call, times):
        took = [self.timed(call)[0] for _ in range(times)]
        return statistics.median(took), took

    # ---------------------------------------------------------------------------------------------- the model
    def inputs(self):
        torch, args = self.torch, self.args
        with open(os.path.join(self.dense, "config.json")) as file:
            config = json.load(file)
        generator = torch.Generator().manual_seed(7)
        there = {"device": self.device, "dtype": torch.bfloat16}
        rows = next(n for n in range(int(args.image**0.5), 0, -1) if args.image % n == 0)
        ids = torch.zeros(rows, args.image // rows, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(args.image // rows)[None, :]

        def noise(*shape):
            return torch.randn(*shape, generator=generator, device="cpu").to(**there)

        return {
            "hidden_states": noise(1, args.image, config["in_channels"]),
            "encoder_hidden_states": noise(1, args.text, config["joint_attention_dim"]),
            "pooled_projections": noise(1, config["pooled_projection_dim"]),
            "timestep": torch.tensor([0.5]).to(**there),
            "guidance": torch.tensor([3.5]).to(**there),
            "img_ids": ids.reshape(-1, 3).to(**there),
            "txt_ids": torch.zeros(args.text, 3).to(**there),
            "return_dict": False,
        }

    def load_diffusers(self):
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_pretrained(self.dense, torch_dtype=self.torch.bfloat16).eval()

    def load_mmgp(self, path, **options):
        from diffusers import FluxTransformer2DModel
        from mmgp import offload

        return offload.fast_load_transformers_model(path, modelClass=FluxTransformer2DModel, verboseLevel=1, **options)

    # ---------------------------------------------------------------------------------------------- systems
    def ready(self, row, told):
        """The model as its system runs it; adds what a step streams to what is told."""
        told["streamed_bytes"] = 0
        if row["how"] == "resident":
            model = self.load_diffusers().to(self.device)
            if row.get("compiled"):
                model.compile_repeated_blocks(fullgraph=True)
            return model
        if row["how"] == "group":
            model = self.load_diffusers()
            tensors = [*model.parameters(), *model.buffers()]
            told["streamed_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
            groups = {"num_blocks_per_group": 1} if row["kind"] == "block" else {}
            model.enable_group_offload(
                onload_device=self.torch.device(self.device),
                offload_device=self.torch.device("cpu"),
                offload_type=f"{row['kind']}_level",
                use_stream=self.device == "cuda",
                record_stream=self.device == "cuda",
                **groups,
            )
            return model
        return self.with_mmgp(row, told)

    def with_mmgp(self, row, told):
        from mmgp import offload

        int8 = row["form"] == "int8"
        model = self.load_mmgp(self.int8 if int8 else os.path.join(self.dense, WEIGHTS))
        budgets = {"transformer": row["mib"]}
        manager = offload.all(
            {"transformer": model}, verboseLevel=1, pinnedMemory=True, budgets=budgets, quantizeTransformer=int8
        )
        if row["repaired"]:
            # 3.8.2 asks whether "model/block" was prefetched and remembers "block", so it never was and all
            # is copied again; bare names on both sides give the right answer. No released system.
            names = manager.prev_blocks_names
            manager.prev_blocks_names = {name: before and before.split("/", 1)[1] for name, before in names.items()}
        kept = {"transformer"} | {f"transformer/{name}" for name in manager.preloaded_blocks_per_model["transformer"]}
        sizes = manager.blocks_of_modules_sizes
        told["streamed_bytes"] = sum(bytes for name, bytes in sizes.items() if name not in kept)
        return model

    # ---------------------------------------------------------------------------------------------- commands
    def prepare(self):
        from accelerate import init_empty_weights
        from diffusers import FluxTransformer2DModel

        double, single = (int(blocks) for blocks in self.args.depth.split("+"))
        with init_empty_weights():
            model = FluxTransformer2DModel(
                num_layers=double, num_single_layers=single, num_attention_heads=self.args.heads, guidance_embeds=True
            )
        os.makedirs(self.dense, exist_ok=True)
        model.save_config(self.dense)
        link = os.path.join(self.dense, WEIGHTS)
        if not os.path.lexists(link):
            os.symlink(f"../flux-{double}+{single}-{self.args.heads * 128}-bf16.safetensors", link)

    def quantize(self):
        from mmgp import offload

        model = self.load_mmgp(os.path.join(self.dense, WEIGHTS), do_quantize=True)
        os.makedirs(os.path.dirname(self.int8), exist_ok=True)
        part = self.int8.replace(".safetensors", "-part.safetensors")
        offload.save_model(model, part, config_file_path=os.path.join(self.dense, "config.json"))
        os.rename(part, self.int8)

    def run(self, row, told):
        torch = self.torch
        sampler = Sampler()
        if row["how"] == "mmgp" and self.device == "cpu":
            raise RuntimeError("needs CUDA")
        # Context and imports are no part of loading.
        torch.zeros(1, device=self.device)
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
        from diffusers import FluxTransformer2DModel  # noqa: F401

        if row["how"] == "mmgp":
            import mmgp.offload  # noqa: F401
        told["link_gb_s"] = self.link()
        begun = time.perf_counter()
        with torch.no_grad():
            model = self.ready(row, told)
            self.wait()
            told["load_s"] = time.perf_counter() - begun
            inputs = self.inputs()

            def step():
                return model(**inputs)[0]

            sampler.start()
            told["first_step_s"], _ = self.timed(step)
            for _ in range(WARM_UP):
                self.timed(step)
            sampler.go.clear()
            told["step_s"], told["step_times"] = self.median(step, self.args.steps)
            sampler.go.set()
            _, output = self.timed(step)
            told["peak_vram_bytes"] = sampler.peak()
            if row["how"] == "resident" and self.device == "cuda" and not row.get("compiled"):
                self.fastest_attention(step, told, sampler)
        told["finite"] = bool(output.isfinite().all())
        with open("/proc/self/status") as file:
            told["peak_rss_bytes"] = int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) * 1024
        if self.device == "cuda":
            told["locked_bytes"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak")

    def fastest_attention(self, step, told, sampler):
        """The same steps with each kernel of attention; the row's are the fastest."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        sampler.go.clear()
        told["attention"] = "default"
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            try:
                with sdpa_kernel(backend):
                    step()
                    took, times = self.median(step, self.args.steps)
            except RuntimeError:  # a kernel that this build or card does not have
                continue
            if took < told["step_s"]:
                told.update(step_s=took, step_times=times, attention=name)

    def link(self):
        """GB/s of copies of 256 MiB from page-locked memory; leaves no memory behind."""
        if self.device == "cpu":
            return None
        torch, bytes = self.torch, 256 << 20
        host = torch.empty(bytes, dtype=torch.uint8, pin_memory=True).random_(0, 255)
        there = torch.empty(bytes, dtype=torch.uint8, device=self.device)
        took, _ = self.median(lambda: there.copy_(host, non_blocking=True), 9)
        del host, there
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        torch.cuda.reset_peak_host_memory_stats()
        return bytes / 1e9 / took


def versions():
    found = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except ImportError:
            pass
    return found


def measured(bench, name, row):
    told = {"row": name, "system": row["system"], "form": row.get("form", "bf16"), "versions": versions()}
    told["budget_bytes"] = row["mib"] << 20 if "mib" in row else None
    begun = time.perf_counter()
    try:
        bench.run(row, told)
    except Exception as error:
        traceback.print_exc()
        told["error"] = f"{type(error).__name__}: {error}"[:400]
    told["process_s"] = time.perf_counter() - begun
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "quantize", "run"))
    parser.add_argument("row", nargs="?", help=f"one of {', '.join(rows())}")
    parser.add_argument("--model", required=True, metavar="DIR", help="where mmgp-gpu-bench keeps the model's files")
    parser.add_argument("--out", default="rows.jsonl", metavar="FILE", help="what a row's line is added to (%(default)s)")
    parser.add_argument("--depth", default="19+38", help="double and single blocks (%(default)s)")
    parser.add_argument("--heads", type=int, default=24, help="of 128 values (%(default)s)")
    parser.add_argument("--image", type=int, default=4096, help="tokens of the picture (%(default)s)")
    parser.add_argument("--text", type=int, default=512, help="tokens of the text (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed (%(default)s)")
    args = parser.parse_args()
    if (args.command == "run") != (args.row in rows()):
        parser.error("run takes the name of a row, the other commands none")
    bench = Bench(args)
    failed = False
    if args.command == "run":
        told = measured(bench, args.row, rows()[args.row])
        failed = "error" in told
        with open(args.out, "a") as file:
            file.write(json.dumps(told) + "\n")
    else:
        getattr(bench, args.command)()
    sys.stdout.flush()
    # Without giving back tens of GB of page-locked memory piece by piece.
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
