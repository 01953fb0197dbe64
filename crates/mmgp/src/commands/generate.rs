//! `mmgp generate`: a prompt becomes pictures or videos.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use mmgp::{
    About, AdapterArg, Bytes, Denoised, GuidanceSchedule, Offload, Pipeline, Request, Tiles, Unfit,
    process_peak, read_picture,
};

use super::{
    machine::{Machine, stop_on_signal},
    progress::Progress,
    write::Out,
};

/// Draw pictures or videos from a prompt.
///
/// Without --model, the small pipeline that comes with mmgp draws: it knows sixteen emoji, such as
/// "red heart", "rocket", "cat face", "pizza", "penguin". What is not given is taken from the
/// pipeline.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  mmgp generate \"red heart\"
  mmgp generate \"a picture of a rocket\" --count 4 --seed 7
  mmgp generate \"a lighthouse at dusk\" --model ~/models/FLUX.1-dev --budget 8GB --out lighthouse.png
  mmgp generate \"a dog runs through snow\" --model ~/models/CogVideoX-5b --quantize int8 --out dog.mp4
  mmgp generate \"the waves move\" --model ~/models/CogVideoX-5b-I2V --image sea.jpg --out sea.webp

Budgets bound the weights in memory at one moment: 6MB, 1.5GB, 25% (of all weights), min, unlimited,
or auto (unlimited if that fits half of the memory that is free). The picture is the same under all.

Latents are kept beside the result until it is decoded: when that fails, `mmgp decode` goes on from them.")]
pub(crate) struct Args {
    /// What to draw
    prompt: String,

    /// A pipeline's folder in diffusers' layout (with a model_index.json)
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// What to keep away from, for pipelines that guide by a second pass
    #[arg(long, value_name = "PROMPT")]
    negative: Option<String>,

    /// The picture that a video begins with (PNG, JPEG or WebP; cut and scaled to the video's size)
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,

    /// Seed of the noise; the same seed draws the same noise as in diffusers. Picture i uses seed + i
    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Denoising steps
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    steps: Option<u64>,

    /// Width in pixels
    #[arg(long, value_name = "PIXELS")]
    width: Option<usize>,

    /// Height in pixels
    #[arg(long, value_name = "PIXELS")]
    height: Option<usize>,

    /// Frames of a video
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    frames: Option<u64>,

    /// Frames a second of a video
    #[arg(long, value_name = "RATE", value_parser = super::fps)]
    fps: Option<f64>,

    /// Guidance scale, for models that have a guidance embedding or guide by a second pass
    #[arg(long, value_name = "SCALE")]
    guidance: Option<f64>,

    /// How the guidance scale goes over the steps: constant, or dynamic as CogVideoX's authors change it
    #[arg(long, value_name = "HOW", value_parser = super::guidance_schedule)]
    guidance_schedule: Option<GuidanceSchedule>,

    /// Tokens of the prompt that the long text encoder sees
    #[arg(long, value_name = "TOKENS")]
    max_sequence_length: Option<usize>,

    /// Whether a video's frames are decoded in tiles: on (where they are larger than the model's tile)
    /// or off (more memory, no seams) [default: on]
    #[arg(long, value_name = "on|off", value_parser = super::tiles)]
    tiles: Option<Tiles>,

    #[command(flatten)]
    machine: Machine,

    /// A LoRA and its weight, 1 if none is given; 0.2,0.8 changes it over the steps (repeatable)
    #[arg(long, value_name = "FILE[:WEIGHT]")]
    lora: Vec<AdapterArg>,

    /// Skip and report what does not fit in a LoRA, instead of failing
    #[arg(long)]
    lora_lenient: bool,

    /// The file to write: .png for a picture; .mp4, .gif, .webp or .png (a folder with a file for each
    /// frame) for a video. Overwritten if it exists. Or a folder [default: named after the prompt, never
    /// overwriting]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// How many pictures or videos
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.machine.hand_over()?;
    let quiet = args.machine.is_quiet();
    let dir = match &args.model {
        Some(dir) => dir.clone(),
        None => demo()?,
    };
    let (mut offload, mut pipeline) = args.machine.open(&dir)?;
    let request = request(args, &*pipeline)?;
    pipeline.check(&request).map_err(mmgp::Error::from)?;
    let mut out = Out::new(args.out.as_deref(), &request)?;
    warn_unused(&*pipeline);

    let mut plan = args.machine.plan(&mut offload, &*pipeline, &request)?;
    if !args.lora.is_empty() {
        let unfit = if args.lora_lenient { Unfit::Skip } else { Unfit::Fail };
        for skipped in offload.load_loras_into_model(&mut *pipeline, &args.lora, unfit)? {
            let file = skipped.file.display();
            eprintln!("warning: {file}: skipped `{}`: {}", skipped.tensor, skipped.reason);
        }
        plan = offload.plan_for(&*pipeline, &request)?;
    }
    if !quiet {
        eprintln!("{plan}");
    }
    stop_on_signal(&offload)?;

    let mut step = None;
    for i in 0..args.count {
        let request = Request { seed: request.seed.wrapping_add(i), ..request.clone() };
        let mut progress = Progress::new(quiet);
        let mut tell = |event| progress.tell(&event);
        let latents = heal(&offload, offload.denoise(&mut *pipeline, &request, &mut tell))?;
        let hash = hash(&latents.values);
        let about = About {
            class: pipeline.class().to_string(),
            model: dir.canonicalize().unwrap_or_else(|_| dir.clone()),
            fps: args.fps.unwrap_or(pipeline.defaults().fps),
            text: text(args, &*pipeline, &request),
            request,
        };
        let denoised = Denoised { about, latents };
        let kept = out.keep(&denoised)?;
        let decoded = out.decode(&offload, &mut *pipeline, &denoised, &mut progress);
        let path = heal(&offload, decoded).with_context(|| {
            let kept = kept.display();
            format!("the latents are kept in {kept}, and `mmgp decode {kept}` goes on from there")
        })?;
        std::fs::remove_file(&kept).with_context(|| kept.display().to_string())?;
        println!("wrote {} (latents {hash})", path.display());
        step = progress.step().or(step);
    }
    finish(&args.machine, &offload, step);
    Ok(())
}

/// What happened, for those who want to know; `step` is what a denoising step took.
pub(crate) fn finish(machine: &Machine, offload: &Offload, step: Option<Duration>) {
    if !machine.is_quiet() {
        eprintln!("{}", offload.report());
        if let Some((step, forecast)) = step.zip(offload.forecast("transformer")) {
            let step = step.as_secs_f64();
            eprintln!(
                "a step took {step:.3} s, {:.3} of the {:.3} s of its schedule: {} streamed at {}/s",
                step / forecast.schedule,
                forecast.schedule,
                forecast.streamed,
                Bytes(forecast.link as u64)
            );
        }
        if let Some(peak) = process_peak() {
            eprintln!("the process' memory peaked at {peak}");
        }
    }
}

/// What failed because of a damaged entry of the store says how to go on.
fn heal<T>(offload: &Offload, result: mmgp::Result<T>) -> anyhow::Result<T> {
    match result {
        Err(error) if offload.heal(&error) => {
            bail!("{error}; it was removed from the store: run the command again to make it anew")
        }
        result => Ok(result?),
    }
}

fn request(args: &Args, pipeline: &dyn Pipeline) -> anyhow::Result<Request> {
    let mut request = pipeline.defaults().request(&args.prompt);
    request.seed = args.seed;
    request.negative = args.negative.clone().unwrap_or_default();
    request.steps = args.steps.map_or(request.steps, |steps| steps as usize);
    request.width = args.width.unwrap_or(request.width);
    request.height = args.height.unwrap_or(request.height);
    request.frames = args.frames.map_or(request.frames, |frames| frames as usize);
    request.guidance = args.guidance.unwrap_or(request.guidance);
    request.guidance_schedule = args.guidance_schedule.unwrap_or(request.guidance_schedule);
    request.max_sequence_length = args.max_sequence_length.unwrap_or(request.max_sequence_length);
    request.tiles = args.tiles.unwrap_or(request.tiles);
    if let Some(image) = &args.image {
        request.image = Some(read_picture(image, request.width, request.height)?);
    }
    Ok(request)
}

/// The pipeline that comes with mmgp: beside its source, or where it is installed.
fn demo() -> anyhow::Result<PathBuf> {
    const NAME: &str = "tiny-flux";
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(NAME);
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.parent()?.join("share/mmgp").join(NAME)));
    let data = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")))
        .map(|data| data.join("mmgp").join(NAME));
    let places: Vec<PathBuf> = [Some(source), beside, data].into_iter().flatten().collect();
    match places.iter().find(|dir| dir.join("model_index.json").is_file()) {
        Some(dir) => Ok(dir.canonicalize().with_context(|| dir.display().to_string())?),
        None => {
            let places: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
            bail!(
                "the demo pipeline is not installed (looked in {}); name a pipeline with --model DIR",
                places.join(", ")
            )
        }
    }
}

fn warn_unused(pipeline: &dyn Pipeline) {
    let unused = pipeline.unused();
    for (model, tensor) in unused.iter().take(8) {
        eprintln!(
            "warning: {model}: tensor `{tensor}` is in the file, but no part of the model uses it"
        );
    }
    if unused.len() > 8 {
        eprintln!("warning: and {} more tensors that nothing uses", unused.len() - 8);
    }
}

/// What goes into the file: what decides its pixels, nothing that depends on the plan.
fn text(args: &Args, pipeline: &dyn Pipeline, request: &Request) -> Vec<(String, String)> {
    let mut recipe: Vec<_> =
        pipeline.recipe(request).iter().map(|(k, v)| format!("{k}: {v}")).collect();
    for AdapterArg { file, weights } in &args.lora {
        let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
        recipe.push(format!("lora: {name} at {weights}"));
    }
    if let Some(image) = &args.image {
        let name = image.file_name().unwrap_or(image.as_os_str()).to_string_lossy();
        recipe.push(format!("image: {name}"));
    }
    [
        ("Software", format!("mmgp {}", env!("CARGO_PKG_VERSION"))),
        ("prompt", request.prompt.clone()),
        ("seed", request.seed.to_string()),
        ("recipe", recipe.join("; ")),
    ]
    .map(|(keyword, text)| (keyword.to_string(), text))
    .to_vec()
}

/// BLAKE3 of the latents' little-endian f32, the first 128 bits.
fn hash(latents: &[f32]) -> String {
    let mut hasher = blake3::Hasher::new();
    for value in latents {
        hasher.update(&value.to_le_bytes());
    }
    hasher.finalize().to_hex()[..32].to_string()
}
