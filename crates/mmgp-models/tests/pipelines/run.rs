//! What `make.py` made, run: from a prompt (and a picture) to latents and frames.

use std::{
    collections::HashMap,
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use mmgp_models::{
    Event, GuidanceSchedule, OpenOptions, Output, Picture, Request, Tiles, open_pipeline,
};
use mmgp_residency::{Budget, Pager};
use serde_json::Value;

pub(crate) type Error = Box<dyn std::error::Error>;

/// Rounded to bytes, two frames may differ by so much where they lie near the middle of two bytes.
const BYTE: i32 = 1;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pipelines").join(name)
}

fn picture(path: &Path) -> Result<Picture, Error> {
    let mut reader = png::Decoder::new(BufReader::new(File::open(path)?)).read_info()?;
    let mut rgb = vec![0; reader.output_buffer_size().ok_or("too large")?];
    let about = reader.next_frame(&mut rgb)?;
    assert_eq!(about.color_type, png::ColorType::Rgb);
    Ok(Picture { width: about.width as usize, height: about.height as usize, rgb })
}

/// The request that a run's arguments are.
fn request(base: &Request, dir: &Path, arguments: &Value) -> Result<Request, Error> {
    let mut request = base.clone();
    // As in diffusers, unless it is asked for.
    request.guidance_schedule = GuidanceSchedule::Constant;
    for (name, value) in arguments.as_object().ok_or("no arguments")? {
        let text = || value.as_str().map(String::from).ok_or("no text");
        let number = || value.as_u64().map(|n| n as usize).ok_or("no number");
        match name.as_str() {
            "prompt" => request.prompt = text()?,
            "negative_prompt" => request.negative = text()?,
            "seed" => request.seed = number()? as u64,
            "num_inference_steps" => request.steps = number()?,
            "guidance_scale" => request.guidance = value.as_f64().ok_or("no number")?,
            "num_frames" => request.frames = number()?,
            "width" => request.width = number()?,
            "height" => request.height = number()?,
            "image" => request.image = Some(picture(&dir.join(text()?))?),
            "use_dynamic_cfg" if value == &Value::Bool(true) => {
                request.guidance_schedule = GuidanceSchedule::Dynamic;
            }
            other => return Err(format!("argument {other} is not known").into()),
        }
    }
    Ok(request)
}

/// How the cases are run.
pub(crate) struct Runner<'a> {
    /// A pager of its own for each run.
    pub(crate) pager: &'a dyn Fn() -> Result<Pager, Error>,
    pub(crate) options: OpenOptions,
    /// What the latents' relative error may be, if not what the case allows.
    pub(crate) allowed: Option<f64>,
    /// Whether frames must be those of the case.
    pub(crate) frames: bool,
}

impl Runner<'_> {
    fn draw(&self, dir: &Path, request: &Request, budget: Budget) -> Result<Output, Error> {
        let pager = (self.pager)()?;
        let mut pipeline = open_pipeline(dir, &pager, &self.options)?;
        assert_eq!(pipeline.unused(), []);
        pager.plan(budget)?;
        let output = pipeline.generate(request, &mut |event| {
            assert!(!matches!(event, Event::Cut { .. }), "{event:?}");
        })?;
        pipeline.check(request)?;
        Ok(output)
    }
}

/// The relative error of latents.
fn error(got: &[f32], want: &Tensor) -> Result<f64, Error> {
    let want = want.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(&want).map(|(a, b)| f64::from(a - b)));
    Ok(off / norm(&mut want.iter().map(|v| f64::from(*v))))
}

/// The frames at `at` are those of `want` `[frames, height, width, 3]`.
fn same_frames(got: &[Picture], at: &Value, want: &Tensor) -> Result<(), Error> {
    let at: Vec<usize> = serde_json::from_value(at.clone())?;
    let (frames, height, width, _) = want.dims4()?;
    assert_eq!(at.len(), frames);
    for (i, at) in at.into_iter().enumerate() {
        let want = want.get(i)?.flatten_all()?.to_vec1::<u8>()?;
        assert_eq!((got[at].height, got[at].width), (height, width));
        let far = |(a, b): (&u8, &u8)| (i32::from(*a) - i32::from(*b)).abs();
        let worst = got[at].rgb.iter().zip(&want).map(far).max();
        assert!(worst <= Some(BYTE), "frame {at}: off by {worst:?}");
        let other = got[at].rgb.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert!(other * 50 < want.len(), "frame {at}: {other} of {} bytes differ", want.len());
    }
    Ok(())
}

/// The case's folder, whole: some borrow files of another, so that they are there once.
fn whole(name: &str) -> Result<(PathBuf, Option<tempfile::TempDir>), Error> {
    let dir = folder(name);
    let case: Value = serde_json::from_reader(File::open(dir.join("case.json"))?)?;
    let Some(from) = case["borrows"]["from"].as_str() else { return Ok((dir, None)) };
    let place = tempfile::tempdir()?;
    link(&dir, place.path())?;
    for file in case["borrows"]["files"].as_array().ok_or("no files")? {
        let file = file.as_str().ok_or("no name")?;
        let to = place.path().join(file);
        std::fs::create_dir_all(to.parent().ok_or("no folder")?)?;
        link(&folder(from).join(file), &to)?;
    }
    Ok((place.path().to_path_buf(), Some(place)))
}

/// Links a file, or all files of a folder, to where they are expected.
fn link(from: &Path, to: &Path) -> Result<(), Error> {
    if !from.is_dir() {
        return Ok(std::os::unix::fs::symlink(from, to)?);
    }
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        link(&path, &to.join(path.file_name().ok_or("no name")?))?;
    }
    Ok(())
}

impl Runner<'_> {
    /// Every run of a case: the latents are near the expected ones, and the same bits under every budget.
    pub(crate) fn run(&self, name: &str) -> Result<(), Error> {
        let (dir, _place) = whole(name)?;
        let case: Value = serde_json::from_reader(File::open(dir.join("case.json"))?)?;
        let tolerance = case["tolerance_rel"].as_f64().ok_or("no tolerance")?;
        let tolerance = self.allowed.unwrap_or(tolerance);
        let expected: HashMap<String, Tensor> =
            candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu)?;
        let pager = Pager::new(&Device::Cpu)?;
        let base = open_pipeline(&dir, &pager, &OpenOptions::default())?.defaults().request("");
        for run in case["runs"].as_array().ok_or("no runs")? {
            let of = |what: &str| {
                let name = format!("{}.{what}", run["name"].as_str().unwrap_or_default());
                expected.get(&name).ok_or(format!("no {name}"))
            };
            let whole = Request { tiles: Tiles::Off, ..request(&base, &dir, &run["arguments"])? };
            let resident = self.draw(&dir, &whole, Budget::Unlimited)?;
            let off = error(&resident.latents.values, of("latents")?)?;
            eprintln!("{name}, {}: latents off by {off:.1e}", run["name"]);
            assert!(off <= tolerance, "{off:e}");
            assert_eq!(Some(resident.frames.len() as u64), run["video"][0].as_u64());
            if self.frames && run["frames"] != Value::Array(Vec::new()) {
                same_frames(&resident.frames, &run["frames"], of("frames")?)?;
            }
            for budget in [Budget::Min, Budget::Percent(60.)] {
                assert!(self.draw(&dir, &whole, budget)? == resident, "{budget}: other bits");
            }
            // Tiles of other sizes than a request has are for tests of the decoder.
            if run["tiled"].is_null() || !run["tiling"].is_null() {
                continue;
            }
            let tiled = Request { tiles: Tiles::On, ..whole.clone() };
            let drawn = self.draw(&dir, &tiled, Budget::Min)?;
            let latents = if whole.image.is_some() { "tiled_latents" } else { "latents" };
            let off = error(&drawn.latents.values, of(latents)?)?;
            assert!(off <= tolerance, "{off:e}");
            if self.frames {
                same_frames(&drawn.frames, &run["tiled"], of("tiled")?)?;
            }
            assert!(drawn.frames != resident.frames, "there were no tiles");
            assert!(self.draw(&dir, &tiled, Budget::Unlimited)? == drawn, "tiled: other bits");
        }
        Ok(())
    }
}
