//! `mmgp decode`: latents that a run left become a picture or a video.

use std::path::PathBuf;

use anyhow::Context;
use mmgp::{Denoised, Tiles};

use super::{
    generate::finish,
    machine::{Machine, stop_on_signal},
    progress::Progress,
    write::Out,
};

/// Decode the latents that a run left when its decoding failed or was stopped.
///
/// `mmgp generate` writes them before it decodes, and removes them when the picture or video is
/// complete.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  mmgp decode a-lighthouse.latents.safetensors
  mmgp decode a-lighthouse.latents.safetensors --out lighthouse.webp --device cpu")]
pub(crate) struct Args {
    /// The file of latents
    latents: PathBuf,

    /// The pipeline's folder [default: the one that the latents were made with]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// The file to write, or a folder, as `mmgp generate` takes it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Frames a second of a video
    #[arg(long, value_name = "RATE", value_parser = super::fps)]
    fps: Option<f64>,

    /// Whether frames are decoded in tiles: on (where they are larger than the model's tile) or off
    /// (more memory, no seams) [default: as the run had it]
    #[arg(long, value_name = "on|off", value_parser = super::tiles)]
    tiles: Option<Tiles>,

    #[command(flatten)]
    machine: Machine,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.machine.hand_over()?;
    let mut denoised = Denoised::open(&args.latents)?;
    let about = &mut denoised.about;
    about.request.tiles = args.tiles.unwrap_or(about.request.tiles);
    about.fps = args.fps.unwrap_or(about.fps);
    let mut out = Out::new(args.out.as_deref(), &about.request)?;
    let dir = args.model.as_ref().unwrap_or(&about.model);
    let (mut offload, mut pipeline) = args.machine.open(dir).with_context(|| {
        format!("{}: its model is in {}", args.latents.display(), dir.display())
    })?;
    anyhow::ensure!(
        pipeline.class() == about.class,
        "{}: latents of a {}, and {} holds a {}",
        args.latents.display(),
        about.class,
        dir.display(),
        pipeline.class()
    );
    let plan = args.machine.plan(&mut offload, &*pipeline, &about.request)?;
    if !args.machine.is_quiet() {
        eprintln!("{plan}");
    }
    stop_on_signal(&offload)?;
    let mut progress = Progress::new(args.machine.is_quiet());
    let path = out.decode(&offload, &mut *pipeline, &denoised, &mut progress)?;
    println!("wrote {}", path.display());
    finish(&args.machine, &offload, None);
    Ok(())
}
