#!/usr/bin/env python3
"""Makes tiny pipelines with random weights, as diffusers stores them, and records what diffusers makes of prompts.

    pip install torch numpy diffusers==0.42.1 transformers==5.23.0 sentencepiece tokenizers protobuf
    python make.py .             all of them, or those that are named: python make.py . cogvideox-2b

Each folder is a pipeline that `from_pretrained` opens, plus

- `case.json`: the arguments of each run, the token ids of its prompts, which frames are kept, what was measured;
- `expected.safetensors`: for the run NAME

  | tensor               | of                                                                          |
  |----------------------|-----------------------------------------------------------------------------|
  | `NAME.prompt_embeds` | the first rows of the text's states, negative prompt first where there is one |
  | `NAME.pooled`        | the pooled state of the second text encoder, where there is one             |
  | `NAME.noise`         | the latents before the first step                                           |
  | `NAME.first`         | what the transformer returned in the first step                             |
  | `NAME.latents`       | the latents after the last step (`output_type="latent"`)                    |
  | `NAME.frames`        | the frames that `case.json` lists, height x width x 3, rounded to bytes     |
  | `NAME.tiled`         | the same after `vae.enable_tiling()`, where the run has it                  |
  | `NAME.image_latents` | what is beside the noise where there is an image: its latents, then zeros   |
  | `NAME.tiled_latents` | the last latents where there is an image, whose encoding is tiled too       |

`cogvideox-1.5-5b-i2v` is no whole folder: the files that its `case.json` lists as `borrows` are those of another.

An image of a run lies beside `case.json`. One generator on the CPU, seeded with `seed`, gives in this order: where there
is an image, the noise of its encoding (1 x channels x 1 x height x width); the latents before the first step, of the
shape of `noise`; for CogVideoX's DPM in each step one draw of that shape, and a second one, used in place of the first, in
all steps but the first and one that ends below timestep 0.

Weights are stored in the types of the real checkpoints, all arithmetic is float32 on the CPU. Sizes are as small as
the models' own rules allow. `case.json` gives as `measured` how far the last latents move, relative to their norm,
if each weight is off by 1e-6, and if the prompt, the negative prompt, the guidance or the seed is another.
"""
import copy
import io
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import diffusers
import numpy
import sentencepiece
import tokenizers
import torch
import transformers
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPT = "a red panda plays the guitar in a quiet forest"
OTHER = "ships of glass drift above the sea at night"
NEGATIVE = "blurry, darkest clouds, low quality"
TEXTS = [
    "the quick brown fox jumps over a lazy dog, isn't it? 0 1 2 3",
    "a quiet guitar plays in the night, and the sea drifts above the dark glass of a ship",
    "red ships and glass guitars, low clouds, a forest at night, playing pandas and drifting leaves",
    "quality of light in a blurry photo, darker and lower than the quick fox that jumps and plays",
]
ROWS = 20
PIECES = 64


# Weights


def randomize(model, seed, gains=()):
    """Fills all parameters: matrices keep the scale of what they are given, norms stay near one, biases near zero.
    `gains` are pairs of a part of a name and a factor."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("pos_embedding")]
    with torch.no_grad():
        for name, tensor in list(model.named_parameters()) + buffers:
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("pos_embedding"):
                values *= 0.5
            elif name.endswith("bias"):
                values *= 0.1
            elif tensor.dim() == 1:
                values = 1 + 0.2 * values
            elif "embed_tokens" not in name and "shared" not in name and "embedding" not in name.split(".")[-2]:
                values /= math.sqrt(tensor[0].numel())
            for part, gain in gains:
                if part in name:
                    values *= gain
            tensor.copy_(values)
    return model.eval()


def spread(vae, channels):
    """Scales the last convolution of a decoder so that few pixels leave the range -1 to 1."""
    with torch.no_grad():
        latents = torch.randn([1, channels, 3, 6, 6], generator=torch.Generator().manual_seed(1))
        last = vae.decoder.conv_out.conv
        for _ in range(2):
            video = vae.decode(latents / vae.config.scaling_factor).sample
            last.bias -= video.mean(dim=(0, 2, 3, 4))
            last.weight *= 0.4 / video.std()
            last.bias *= 0.4 / video.std()


# Tokenizers


def t5_tokenizer(folder):
    """A unigram model with T5's special ids, and the small files that lie beside it; four of T5's
    hundred extra ids."""
    texts = [PROMPT, OTHER, NEGATIVE, *TEXTS]
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 2 + [word for text in texts for word in text.split()]),
        model_writer=data,
        vocab_size=PIECES,
        model_type="unigram",
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(data.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(4)]
    ids = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {token: PIECES + 3 - i for i, token in enumerate(extra)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {"additional_special_tokens": extra, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write(folder / "added_tokens.json", {token: ids[token] for token in extra})
    write(folder / "special_tokens_map.json", special)
    write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": True,
            "added_tokens_decoder": {str(i): {"content": t} | flags for t, i in sorted(ids.items(), key=lambda x: x[1])},
            **special,
            "clean_up_tokenization_spaces": True,
            "extra_ids": 4,
            "legacy": True,
            "model_max_length": 226,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
        },
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())
    for text in [PROMPT, OTHER, NEGATIVE, ""]:
        assert tokenizer(text).input_ids == own.encode(text) + [1], text
    assert len(tokenizer) == PIECES + 4, len(tokenizer)
    return tokenizer


def merge_pairs(words, most):
    """Merges of byte pairs, the most frequent first, as `left right`; `words` are lists of letters."""
    merges = []
    while len(merges) < most:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(f"{left} {right}")
        for word in words:
            for at in reversed(range(len(word) - 1)):
                if word[at : at + 2] == [left, right]:
                    word[at : at + 2] = [left + right]
    return merges


def llama_tokenizer(folder):
    """Bytes and pairs as Llama 3 has them, of the words of HunyuanVideo's template, so that what is before the prompt
    is 95 tokens, as it is with Llama's own. Other words become several tokens."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"]
    plain = template.replace("{}", "\n")
    for token in special:
        plain = plain.replace(token, "\n")
    split = pre_tokenizers.Split(
        tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
            r"\s+(?!\S)|\s+"
        ),
        behavior="isolated",
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = pre_tokenizers.Sequence([split, bytes_])
    words = [word for word, _ in before.pre_tokenize_str(plain)]
    others = [word for word, _ in before.pre_tokenize_str(" ".join([PROMPT, OTHER, NEGATIVE]))]
    letters = sorted(set("".join(words + others)))
    merges = merge_pairs([list(word) for word in words], 1000)
    vocab = {token: i for i, token in enumerate(letters + [merge.replace(" ", "") for merge in merges])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    begin = (special[0], tokenizer.token_to_id(special[0]))
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin[0]} $A", f"{begin[0]} $A {begin[0]} $B", [begin])
    folder.mkdir(parents=True)
    data = json.loads(tokenizer.to_str())
    data["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    names = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[5]}
    write(folder / "special_tokens_map.json", names)
    write(
        folder / "tokenizer_config.json",
        names
        | {
            "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "padding_side": "right",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tokenizer(template.split("{}")[0]).input_ids) == DEFAULT_PROMPT_TEMPLATE["crop_start"]
    assert tokenizer.batch_decode(tokenizer([PROMPT]).input_ids) == [special[0] + PROMPT]
    return tokenizer


def clip_tokenizer(folder):
    """CLIP's pairs, with few letters and few words; the end pads and stands for what is unknown."""
    words = [list(word[:-1]) + [word[-1] + "</w>"] for word in " ".join([PROMPT, OTHER]).split()]
    letters = sorted(set("".join([PROMPT, OTHER, NEGATIVE]).replace(" ", "")))
    merges = merge_pairs(words, 40)
    vocab = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    special = ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab + special)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    names = dict(bos_token=special[0], eos_token=special[1], pad_token=special[1], unk_token=special[1])
    write(folder / "special_tokens_map.json", names)
    write(folder / "tokenizer_config.json", names | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(PROMPT).input_ids[1:-1]).strip() == PROMPT, tokenizer(PROMPT)
    return tokenizer


# Folders and runs


def write(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def save(folder, pipeline, tokenizers, dtypes, shards=()):
    """What `save_pretrained` of the whole pipeline writes, with the tokenizers' own files kept."""
    for name, dtype in dtypes.items():
        model = copy.deepcopy(getattr(pipeline, name)).to(dtype)
        size = sum(t.numel() for t in model.state_dict().values()) * dtype.itemsize
        model.save_pretrained(folder / name, max_shard_size=size * 2 // 3 if name in shards else "1GB")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
    for name, part in sorted(pipeline.components.items()):
        module = type(part).__module__.split(".")[0]
        index[name] = [module, tokenizers.get(name) or type(part).__name__]
    write(folder / "model_index.json", index)


class Runs:
    """Runs a pipeline as it is stored, and gathers what a case has."""

    def __init__(self, folder, kind, fps=8):
        self.folder, self.kind, self.fps = folder, kind, fps
        self.expected, self.runs = {}, []

    def open(self):
        pipe = self.kind.from_pretrained(self.folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe, arguments, output_type="latent"):
        arguments = dict(arguments)
        generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
        if "image" in arguments:
            arguments["image"] = Image.open(self.folder / arguments["image"])
        return pipe(**arguments, generator=generator, output_type=output_type).frames

    def tokens(self, pipe, arguments):
        """The ids of each text, before padding; `prompt_2` those of the second tokenizer."""
        ids = {key: pipe.tokenizer(arguments[key]).input_ids for key in ("prompt", "negative_prompt") if key in arguments}
        if hasattr(pipe, "tokenizer_2"):
            prompt = arguments["prompt"]
            ids["prompt"] = pipe.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)).input_ids
            ids["prompt_2"] = pipe.tokenizer_2(prompt).input_ids
        return ids

    def run(self, name, arguments, frames, tiled=None, other=(), tiling=None):
        """One run of the case. `other` are arguments, one at a time to be changed, that must make a difference;
        `tiling` are arguments of `enable_tiling`."""
        pipe = self.open()
        seen, calls, noise = {}, [], []
        draw = pipe.prepare_latents

        def keep(*a, **k):
            result = draw(*a, **k)
            noise.extend(result if isinstance(result, tuple) else [result])
            return result

        pipe.prepare_latents = keep
        hook = pipe.transformer.register_forward_hook(
            lambda module, inputs, named, result: calls.append((named, result[0].clone())), with_kwargs=True
        )
        latents = self.call(pipe, arguments)
        hook.remove()
        del pipe.prepare_latents
        seen["prompt_embeds"] = calls[0][0]["encoder_hidden_states"][:, :ROWS]
        if "pooled_projections" in calls[0][0]:
            seen["pooled"] = calls[0][0]["pooled_projections"]
        seen["noise"], seen["first"], seen["latents"] = noise[0], calls[0][1], latents
        if len(noise) > 1:
            seen["image_latents"] = noise[1]
        whole = torch.from_numpy(self.call(pipe, arguments, "np")[0])
        video = whole[frames]
        if frames:
            seen["frames"] = (video * 255).round().to(torch.uint8)
        measured = {"clamped": ((whole == 0) | (whole == 1)).double().mean().item()}
        if tiled is not None:
            pipe.vae.enable_tiling(**(tiling or {}))
            tiles = torch.from_numpy(self.call(pipe, arguments, "np")[0])[tiled]
            if "image" in arguments:
                seen["tiled_latents"] = self.call(pipe, arguments)
            pipe.vae.disable_tiling()
            seen["tiled"] = (tiles * 255).round().to(torch.uint8)
            measured["tiling"] = far(tiles, whole[tiled])
        for changed in other:
            measured[changed] = far(self.call(pipe, arguments | self.changes(changed)), latents)
            assert measured[changed] > 1e-2, (name, changed, measured)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for part in ("transformer", "text_encoder", "text_encoder_2"):
                for weight in getattr(pipe, part).parameters() if hasattr(pipe, part) else ():
                    weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator)
        measured["weights off by 1e-6"] = far(self.call(pipe, arguments), latents)
        assert measured["weights off by 1e-6"] < 1e-5, measured
        self.runs.append(
            {
                "name": name,
                "arguments": dict(arguments),
                "token_ids": self.tokens(pipe, arguments),
                "video": list(whole.shape),
                "frames": frames,
                "tiled": tiled,
                "tiling": tiling,
                "measured": {k: float(f"{v:.2e}") for k, v in measured.items()},
            }
        )
        self.expected |= {f"{name}.{k}": v.contiguous() for k, v in seen.items()}
        print(self.folder.name, json.dumps(self.runs[-1]["measured"]))
        for key, value in seen.items():
            print("  ", name, key, list(value.shape), f"std {value.double().std():.3f}")

    def changes(self, name):
        values = {"prompt": OTHER, "negative_prompt": OTHER, "guidance_scale": 3.0, "seed": 1234}
        return {name: (values | {"use_dynamic_cfg": False, "image": "other.png"})[name]}

    def finish(self, **more):
        save_file(self.expected, self.folder / "expected.safetensors")
        versions = {m.__name__: m.__version__ for m in (diffusers, transformers, torch, numpy)}
        write(
            self.folder / "case.json",
            {
                "pipeline": self.kind.__name__,
                "versions": versions,
                "arithmetic": "float32",
                "fps": self.fps,
                "tolerance_rel": 1e-3,
                **more,
                "runs": self.runs,
            },
        )
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        print(self.folder.name, size, "bytes")


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# CogVideoX


def t5(seed):
    """T5 v1.1: a gated feed-forward, no tied head; rows of the table beyond the tokenizer's, as T5 has them."""
    config = T5Config(
        vocab_size=PIECES + 8,
        d_model=18,
        d_kv=6,
        d_ff=26,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return randomize(T5EncoderModel(config), seed, [("relative_attention_bias", 4.0), ("final_layer_norm", 2.0)])


def cogvideox_transformer(seed, **config):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 12,
        "text_embed_dim": 18,
        "num_layers": 2,
        "sample_frames": 9,
        "max_text_seq_length": 226,
    } | config
    return randomize(CogVideoXTransformer3DModel(**config), seed)


def cogvideox_vae(seed, channels, **config):
    """Tiles are half the sample: 6 x 5 latents, whose sixth and fifth part are whole numbers."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=channels,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        sample_height=96,
        sample_width=80,
        **config,
    )
    randomize(vae, seed)
    spread(vae, 4)
    return vae


SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def cogvideox_2b(folder):
    """Positions of sines and cosines, DDIM."""
    pipe = CogVideoXPipeline(
        tokenizer=t5_tokenizer(folder / "tokenizer"),
        text_encoder=t5(11),
        vae=cogvideox_vae(12, (2, 4, 4, 6), scaling_factor=1.15258426),
        transformer=cogvideox_transformer(
            13, num_attention_heads=4, attention_head_dim=8, sample_height=6, sample_width=4
        ),
        scheduler=CogVideoXDDIMScheduler(**SCHEDULE, snr_shift_scale=3.0),
    )
    types = {"text_encoder": torch.float16, "transformer": torch.float16, "vae": torch.float16}
    save(folder, pipe, {"tokenizer": "T5Tokenizer"}, types)
    runs = Runs(folder, CogVideoXPipeline)
    arguments = {"prompt": PROMPT, "seed": 42, "num_inference_steps": 4, "guidance_scale": 6.0, "num_frames": 9}
    runs.run("sample", arguments, [7], other=["prompt", "negative_prompt", "guidance_scale", "seed"])
    # Of another size than the sample, odd in patches, and large enough to be tiled.
    arguments |= {"height": 64, "width": 48, "num_frames": 13, "num_inference_steps": 3, "seed": 7}
    arguments |= {"negative_prompt": NEGATIVE}
    runs.run("larger", arguments, [9], tiled=[12], other=["prompt", "negative_prompt", "guidance_scale", "seed"])
    runs.finish()


def cogvideox_5b(folder):
    """Rotary positions, DPM with its noise, guidance that follows the step."""
    pipe = CogVideoXPipeline(
        tokenizer=t5_tokenizer(folder / "tokenizer"),
        text_encoder=t5(21),
        vae=cogvideox_vae(22, (4, 4, 4, 4), scaling_factor=0.7),
        transformer=cogvideox_transformer(
            23, sample_height=6, sample_width=8, use_rotary_positional_embeddings=True
        ),
        scheduler=CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0),
    )
    types = {"text_encoder": torch.bfloat16, "transformer": torch.bfloat16, "vae": torch.bfloat16}
    save(folder, pipe, {"tokenizer": "T5Tokenizer"}, types, shards=["transformer", "text_encoder"])
    runs = Runs(folder, CogVideoXPipeline)
    # The fifth power in this guidance is of numbers up to a hundred, of which a cosine is taken: with eight steps, a
    # power of two, it is exact, so that the guidance is the same everywhere.
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seed": 5,
        "num_inference_steps": 8,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": True,
        "num_frames": 9,
        "height": 48,
        "width": 80,
    }
    changes = ["prompt", "negative_prompt", "guidance_scale", "seed", "use_dynamic_cfg"]
    runs.run("dynamic", arguments, [8], tiled=[5], other=changes)
    # Taller than the sample, so that the grid of positions is cut on the other side.
    arguments = {"prompt": PROMPT, "seed": 6, "num_inference_steps": 5, "guidance_scale": 6.0, "num_frames": 5}
    runs.run("tall", arguments | {"height": 64, "width": 32}, [2], other=["prompt", "guidance_scale", "seed"])
    runs.finish()


def picture(path, width, height, turn):
    """Smooth colours, so that the file is small."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    colours = [torch.sin(x + turn), torch.cos(x * y / 2 + turn), torch.sin(y - 2 * x)]
    pixels = (torch.stack(colours, dim=2) * 120 + 128).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


def cogvideox_5b_i2v(folder):
    """An image for the first frame; learned positions on top of the rotary ones, so that the size is the sample's."""
    pipe = CogVideoXImageToVideoPipeline(
        tokenizer=t5_tokenizer(folder / "tokenizer"),
        text_encoder=t5(31),
        vae=cogvideox_vae(32, (2, 4, 4, 4), scaling_factor=0.7),
        transformer=cogvideox_transformer(
            33,
            in_channels=8,
            num_layers=1,
            sample_height=4,
            sample_width=6,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        ),
        scheduler=CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0),
    )
    types = {"text_encoder": torch.bfloat16, "transformer": torch.bfloat16, "vae": torch.bfloat16}
    save(folder, pipe, {"tokenizer": "T5Tokenizer"}, types)
    runs = Runs(folder, CogVideoXImageToVideoPipeline)
    picture(folder / "image.png", 48, 32, 0)
    picture(folder / "other.png", 48, 32, 2)
    arguments = {
        "image": "image.png",
        "prompt": PROMPT,
        "seed": 3,
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
        "num_frames": 9,
        "height": 32,
        "width": 48,
    }
    changes = ["image", "prompt", "negative_prompt", "guidance_scale", "seed"]
    runs.run("image", arguments, [0, 6], tiled=[0, 3], other=changes)
    (folder / "other.png").unlink()
    runs.finish()


def cogvideox_15_i2v(folder):
    """Patches over two frames, an input `ofs`, latents of the image that are divided by the scaling factor. All else is
    that of `cogvideox-5b-i2v`, which is to be copied below it."""
    other = folder.with_name("cogvideox-5b-i2v")
    borrowed = ["tokenizer", "text_encoder", "vae/diffusion_pytorch_model.safetensors", "image.png"]
    shutil.copytree(other, folder, ignore=shutil.ignore_patterns("case.json", "expected.safetensors", "transformer"))
    transformer = cogvideox_transformer(
        53,
        num_attention_heads=1,
        in_channels=8,
        num_layers=1,
        patch_size_t=2,
        ofs_embed_dim=12,
        sample_height=6,
        sample_width=8,
        use_rotary_positional_embeddings=True,
    )
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    config = json.loads((folder / "vae/config.json").read_text())
    write(folder / "vae/config.json", config | {"invert_scale_latents": True})
    picture(folder / "other.png", 48, 32, 2)
    runs = Runs(folder, CogVideoXImageToVideoPipeline, fps=16)
    # Three latent frames, to which a fourth is added, which is dropped before decoding.
    arguments = {
        "image": "image.png",
        "prompt": OTHER,
        "negative_prompt": NEGATIVE,
        "seed": 4,
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": True,
        "num_frames": 9,
        "height": 32,
        "width": 48,
    }
    runs.run("padded", arguments, [5], other=["image", "negative_prompt", "guidance_scale", "seed"])
    for name in borrowed + ["other.png"]:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    runs.finish(borrows={"from": other.name, "files": borrowed})


# HunyuanVideo


def hunyuanvideo(folder):
    """Two text encoders, a template around the prompt, guidance that is an input of the transformer."""
    llama, clip = llama_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2")
    text = LlamaConfig(
        vocab_size=len(llama),
        hidden_size=18,
        intermediate_size=26,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
        use_cache=False,
    )
    text_2 = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=14,
        intermediate_size=22,
        projection_dim=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        # As in the real config, where it means that the highest id ends a text.
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=6,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=18,
        pooled_projection_dim=14,
        rope_axes_dim=(2, 2, 2),
    )
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(2, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    randomize(vae, 44)
    spread(vae, 4)
    pipe = HunyuanVideoPipeline(
        tokenizer=llama,
        text_encoder=randomize(LlamaModel(text), 41),
        tokenizer_2=clip,
        text_encoder_2=randomize(CLIPTextModel(text_2), 42),
        transformer=randomize(transformer, 43),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    types = {
        "text_encoder": torch.float16,
        "text_encoder_2": torch.float16,
        "transformer": torch.bfloat16,
        "vae": torch.float16,
    }
    save(folder, pipe, {"tokenizer": "PreTrainedTokenizerFast", "tokenizer_2": "CLIPTokenizer"}, types)
    # As the library wrote both when the real files were made.
    weights = load_file(folder / "text_encoder_2/model.safetensors")
    weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, folder / "text_encoder_2/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "text_encoder/config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    write(folder / "text_encoder/config.json", dict(sorted(config.items())))
    runs = Runs(folder, HunyuanVideoPipeline, fps=15)
    changes = ["prompt", "guidance_scale", "seed"]
    arguments = {"prompt": PROMPT, "seed": 8, "num_inference_steps": 4, "guidance_scale": 6.0, "num_frames": 9}
    runs.run("plain", arguments | {"height": 32, "width": 48}, [6], other=changes)
    # More than four latent frames are decoded in groups, blended over time, tiled or not.
    arguments |= {"num_frames": 21, "num_inference_steps": 3, "height": 48, "width": 32, "seed": 9}
    tiles = {"tile_sample_min_height": 32, "tile_sample_min_width": 24}
    tiles |= {"tile_sample_stride_height": 24, "tile_sample_stride_width": 16}
    runs.run("long", arguments, [14], tiled=[15], other=changes, tiling=tiles)
    # So wide that the default tiles are two.
    arguments |= {"num_frames": 5, "num_inference_steps": 2, "height": 16, "width": 272, "prompt": OTHER}
    runs.run("wide", arguments, [], tiled=[3], other=["seed"])
    runs.finish()


CASES = {
    "cogvideox-2b": cogvideox_2b,
    "cogvideox-5b": cogvideox_5b,
    "cogvideox-5b-i2v": cogvideox_5b_i2v,
    "cogvideox-1.5-5b-i2v": cogvideox_15_i2v,
    "hunyuanvideo": hunyuanvideo,
}


def main():
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)
        CASES[name](out / name)


if __name__ == "__main__":
    main()
