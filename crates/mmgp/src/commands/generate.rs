//! `mmgp generate`: a prompt becomes pictures.

use std::{
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mmgp::{
    AdapterArg, Budget, Bytes, DeviceChoice, Event, Hardware, Medium, Names, Offload, Pipeline,
    Profile, Request, Settings, Unfit, process_peak,
};

use super::quantize::{Quantize, StoreArg};

/// Draw pictures from a prompt.
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

Budgets bound the weights in memory at one moment: 6MB, 1.5GB, 25% (of all weights), min, unlimited,
or auto (unlimited if that fits half of the memory that is free). The picture is the same under all.")]
pub(crate) struct Args {
    /// What to draw
    prompt: String,

    /// A pipeline's folder in diffusers' layout (with a model_index.json)
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

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

    /// Guidance scale, for models that have a guidance embedding
    #[arg(long, value_name = "SCALE")]
    guidance: Option<f64>,

    /// Tokens of the prompt that the long text encoder sees
    #[arg(long, value_name = "TOKENS")]
    max_sequence_length: Option<usize>,

    /// Where to run: auto (a GPU if there is one), cpu, cuda or cuda:N. GPUs need `mmgp-cuda` beside
    /// this command, or a build for CUDA
    #[arg(long, default_value_t)]
    device: DeviceChoice,

    /// Limit on all weights in memory at one moment: 6MB, 25%, min, unlimited or auto
    #[arg(long)]
    budget: Option<String>,

    /// The most VRAM of the whole process, such as 8GB: one card stands for a smaller one
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    vram_limit: Option<Bytes>,

    /// Bytes a second at which weights are copied to the GPU at most, such as 12GB/s
    #[arg(long, value_name = "BYTES/s", value_parser = rate)]
    link_limit: Option<Bytes>,

    /// Limits of single models in MiB, beside the budget of all: transformer=1200,*=3000
    #[arg(long, value_name = "MODEL=MIB,…")]
    budgets: Option<String>,

    /// A preset by number or name: 1 HighRAM_HighVRAM, 2 HighRAM_LowVRAM, 3 LowRAM_HighVRAM,
    /// 4 LowRAM_LowVRAM, 5 VerylowRAM_LowVRAM
    #[arg(long)]
    profile: Option<Profile>,

    #[command(flatten)]
    quantize: Quantize,

    /// Where quantized models, and times of passes, are kept for the next start: a folder, or `off`
    /// [default: mmgp in the user's cache folder]
    #[arg(long, value_name = "DIR|off")]
    store: Option<StoreArg>,

    /// A LoRA and its weight, 1 if none is given; 0.2,0.8 changes it over the steps (repeatable)
    #[arg(long, value_name = "FILE[:WEIGHT]")]
    lora: Vec<AdapterArg>,

    /// Skip and report what does not fit in a LoRA, instead of failing
    #[arg(long)]
    lora_lenient: bool,

    /// 0: as --quiet; 2: print every setting, where it comes from, and whether it acts on this machine
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=2))]
    verbose: u8,

    /// The file to write (.png; overwritten if it exists), or a folder [default: named after the
    /// prompt, never overwriting]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// How many pictures
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,

    /// Print neither plan nor progress nor report
    #[arg(long, short)]
    quiet: bool,
}

impl Args {
    fn is_quiet(&self) -> bool {
        self.quiet || self.verbose == 0
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    #[cfg(not(feature = "cuda"))]
    crate::sibling::hand_over(args.device, |why| {
        if !args.is_quiet() {
            eprintln!("{why}");
        }
    })?;
    let mut names = match &args.out {
        Some(out) => Names::at(out, &args.prompt, Medium::Picture)?,
        None => Names::of_prompt(&args.prompt, Medium::Picture),
    };
    let dir = match &args.model {
        Some(dir) => dir.clone(),
        None => demo()?,
    };
    let settings = settings(args)?;
    if args.verbose >= 2 {
        eprintln!("{}", settings.explain(&Hardware::detect()));
    }
    let mut builder = Offload::builder().device(args.device).settings(settings);
    if let Some(limit) = args.vram_limit {
        builder = builder.vram_limit(limit);
    }
    if let Some(limit) = args.link_limit {
        builder = builder.link_limit(limit);
    }
    if let Some(store) = StoreArg::store(args.store.as_ref()) {
        builder = builder.store(store, |line| eprintln!("{line}"));
    }
    let mut offload = builder.build()?;
    let mut pipeline = offload.pipeline(&dir)?;
    let request = request(args, &*pipeline);
    pipeline.check(&request).map_err(mmgp::Error::from)?;
    warn_unused(&*pipeline);

    let budget = args.budget.as_ref().or(pipeline.defaults().budget.as_ref());
    if let Some(budget) = budget {
        offload.set_budget(budget.parse::<Budget>().map_err(mmgp::Error::from)?);
    }
    let mut plan = match offload.plan_for(&*pipeline, &request) {
        // The pipeline's own default was made for its weights as they are stored.
        Err(mmgp::Error::Residency(mmgp_residency::Error::BudgetTooSmall { minimum, .. }))
            if args.budget.is_none() =>
        {
            eprintln!("note: the pipeline's default budget is too small here; using {minimum}");
            offload.set_budget(Budget::Min);
            offload.plan_for(&*pipeline, &request)?
        }
        plan => plan?,
    };
    if !args.lora.is_empty() {
        let unfit = if args.lora_lenient { Unfit::Skip } else { Unfit::Fail };
        for skipped in offload.load_loras_into_model(&mut *pipeline, &args.lora, unfit)? {
            let file = skipped.file.display();
            eprintln!("warning: {file}: skipped `{}`: {}", skipped.tensor, skipped.reason);
        }
        plan = offload.plan_for(&*pipeline, &request)?;
    }
    if !args.is_quiet() {
        eprintln!("{plan}");
    }
    stop_on_signal(&offload)?;

    for i in 0..args.count {
        let request = Request { seed: request.seed.wrapping_add(i), ..request.clone() };
        let mut progress = Progress::new(args.is_quiet());
        let picture =
            offload.generate(&mut *pipeline, &request, &mut |event| progress.tell(&event));
        progress.finish();
        let picture = match picture {
            Err(error) if offload.heal(&error) => {
                bail!(
                    "{error}; it was removed from the store: run the command again to make it anew"
                )
            }
            picture => picture?,
        };
        let path = names.write(&picture, &text(args, &*pipeline, &request))?;
        println!("wrote {} (latents {})", path.display(), hash(&picture.latents));
    }
    if !args.is_quiet() {
        eprintln!("{}", offload.report());
        if let Some(peak) = process_peak() {
            eprintln!("the process' memory peaked at {peak}");
        }
    }
    Ok(())
}

fn bytes(text: &str) -> Result<Bytes, String> {
    let amount = Bytes::parse(text).filter(|bytes| bytes.0 > 0);
    amount.ok_or_else(|| "expected an amount such as 8GB or 6000MiB".into())
}

fn rate(text: &str) -> Result<Bytes, String> {
    bytes(text.strip_suffix("/s").unwrap_or(text))
        .map_err(|_| "expected an amount a second such as 12GB/s".into())
}

fn request(args: &Args, pipeline: &dyn Pipeline) -> Request {
    let mut request = pipeline.defaults().request(&args.prompt);
    request.seed = args.seed;
    request.steps = args.steps.map_or(request.steps, |steps| steps as usize);
    request.width = args.width.unwrap_or(request.width);
    request.height = args.height.unwrap_or(request.height);
    request.guidance = args.guidance.unwrap_or(request.guidance);
    request.max_sequence_length = args.max_sequence_length.unwrap_or(request.max_sequence_length);
    request
}

/// The profile's settings, or the defaults, with what the options override.
fn settings(args: &Args) -> anyhow::Result<Settings> {
    let mut settings = args.profile.map_or_else(Settings::default, Profile::settings);
    if let Some(budgets) = &args.budgets {
        settings.set("budgets", budgets).map_err(mmgp::Error::from).context("--budgets")?;
    }
    args.quantize.apply(&mut settings)?;
    Ok(settings)
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

/// The first Ctrl-C stops at the next block, the second at once.
fn stop_on_signal(offload: &Offload) -> anyhow::Result<()> {
    let cancel = offload.cancel_flag();
    ctrlc::set_handler(move || {
        if cancel.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this block; again to stop at once");
    })
    .context("cannot listen for Ctrl-C")
}

/// What goes into the file: what decides its pixels, nothing that depends on the plan.
fn text(args: &Args, pipeline: &dyn Pipeline, request: &Request) -> Vec<(&'static str, String)> {
    let mut recipe: Vec<_> =
        pipeline.recipe(request).iter().map(|(k, v)| format!("{k}: {v}")).collect();
    for AdapterArg { file, weights } in &args.lora {
        let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
        recipe.push(format!("lora: {name} at {weights}"));
    }
    vec![
        ("Software", format!("mmgp {}", env!("CARGO_PKG_VERSION"))),
        ("prompt", request.prompt.clone()),
        ("seed", request.seed.to_string()),
        ("recipe", recipe.join("; ")),
    ]
}

/// BLAKE3 of the latents' little-endian f32, the first 128 bits.
fn hash(latents: &[f32]) -> String {
    let mut hasher = blake3::Hasher::new();
    for value in latents {
        hasher.update(&value.to_le_bytes());
    }
    hasher.finalize().to_hex()[..32].to_string()
}

/// A bar per denoising run, with seconds per step; where there is no terminal to draw it on, a line per step.
struct Progress {
    bar: ProgressBar,
    lines: bool,
    step: Option<Instant>,
    last: Duration,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        let target =
            if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(None, target);
        let lines = !quiet && bar.is_hidden();
        Self { bar, lines, step: None, last: Duration::ZERO }
    }

    fn tell(&mut self, event: &Event) {
        match event {
            Event::Encoding => self.bar.set_message("encoding the prompt"),
            Event::Cut { encoder, limit, text } => self.bar.suspend(|| {
                eprintln!(
                    "warning: the prompt is longer than the {limit} tokens that {encoder} sees; cut: {text:?}"
                );
            }),
            Event::Step { index, of } => {
                if let Some(begun) = self.step.replace(Instant::now()) {
                    self.last = begun.elapsed();
                    self.line(*index, *of);
                } else if let Ok(style) =
                    ProgressStyle::with_template("{bar:30} step {pos}/{len}  {msg}  {elapsed_precise}")
                {
                    self.bar.set_style(style);
                    self.bar.set_length(*of as u64);
                }
                self.bar.set_position(*index as u64);
                if *index > 0 {
                    self.bar.set_message(format!("{:.2} s/step", self.last.as_secs_f64()));
                }
            }
            Event::Decoding => {
                if let Some(begun) = self.step.take() {
                    self.last = begun.elapsed();
                    let steps = self.bar.length().unwrap_or(0) as usize;
                    self.line(steps, steps);
                }
                self.bar.set_position(self.bar.length().unwrap_or(0));
                let last = self.last.as_secs_f64();
                self.bar.set_message(format!("{last:.2} s/step, decoding"));
            }
            _ => {}
        }
    }

    /// So many steps are done.
    fn line(&self, done: usize, of: usize) {
        if self.lines {
            eprintln!("step {done} of {of}: {:.2} s", self.last.as_secs_f64());
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
