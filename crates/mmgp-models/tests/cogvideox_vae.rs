//! CogVideoX's decoder where the golden case says nothing: one latent frame, an even number, tiles
//! with their blending, and frames in batches.
//!
//! What diffusers computes is in `cogvideox_vae.safetensors`, made by `cogvideox_vae.py`:
//! `NAME.latents`, and some of the decoded frames as `NAME.frames`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::{
    Error,
    vae::cogvideox::{CogVideoXDecoder, CogVideoXVaeConfig, Tiling},
};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const TILING: Tiling =
    Tiling { height: 32, width: 24, overlap_height: 1. / 4., overlap_width: 1. / 3. };

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/models/vae-cogvideox")
}

fn config() -> Result<CogVideoXVaeConfig> {
    Ok(CogVideoXVaeConfig::from_file(folder().join("config.json"))?)
}

fn decoder() -> Result<CogVideoXDecoder> {
    let pager = Pager::new(&Device::Cpu)?;
    let checkpoint = Arc::new(Checkpoint::open(folder().join("model.safetensors"))?);
    let model = CogVideoXDecoder::new(&config()?, ModelBuilder::new(&pager, "vae", checkpoint))?;
    pager.plan(Budget::Min)?;
    Ok(model)
}

fn latents(frames: usize) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1., (1, 6, frames, 3, 2), &Device::Cpu)?)
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

#[test]
fn frames_are_those_of_diffusers() -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cogvideox_vae.safetensors");
    let golden = candle_core::safetensors::load(file, &Device::Cpu)?;
    let model = decoder()?;
    for (name, count, frames, tiling) in [
        ("one", 1, &[0u32][..], None),
        ("even", 16, &[0, 7, 8, 15], None),
        ("tiled", 16, &[0, 8, 15], Some(TILING)),
        ("tiled_one", 1, &[0], Some(TILING)),
    ] {
        let latents = &golden[&format!("{name}.latents")];
        let got = match tiling {
            Some(tiling) => model.decode_tiled(latents, &tiling)?,
            None => model.decode(latents)?,
        };
        assert_eq!(got.dim(2)?, count, "{name}");
        let got = got.index_select(&Tensor::new(frames, &Device::Cpu)?, 2)?;
        let want = &golden[&format!("{name}.frames")];
        assert_eq!(got.dims(), want.dims(), "{name}");
        let norm = |t: &Tensor| t.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
        let error = norm(&(&got - want)?)? / norm(want)?;
        println!("{name}: {error:.1e}");
        assert!(error < 1e-5, "{name}: {error}"); // f32 against f32, 40 layers deep
    }
    Ok(())
}

#[test]
fn batches_of_frames_are_the_whole() -> Result<()> {
    let model = decoder()?;
    for (frames, expected) in [(1, &[1][..]), (2, &[8]), (3, &[9]), (7, &[9, 8, 8]), (4, &[8, 8])] {
        let latents = latents(frames)?;
        let mut parts = Vec::new();
        model.decode_frames(&latents, |part| {
            parts.push(part);
            Ok(())
        })?;
        let counts = parts.iter().map(|p| p.dim(2)).collect::<candle_core::Result<Vec<_>>>()?;
        assert_eq!(counts, expected);
        assert_eq!(config()?.frames(frames), counts.iter().sum::<usize>());
        let whole = model.decode(&latents)?;
        assert_eq!(bits(&Tensor::cat(&parts, 2)?)?, bits(&whole)?);
        // Later latents change no earlier frame.
        if frames == 7 {
            let first = model.decode(&latents.narrow(2, 0, 5)?)?;
            assert_eq!(bits(&first)?, bits(&whole.narrow(2, 0, 17)?)?);
        }
    }
    Ok(())
}

#[test]
fn a_caller_can_stop() -> Result<()> {
    let model = decoder()?;
    let mut calls = 0;
    let result = model.decode_frames(&latents(6)?, |_| {
        calls += 1;
        Err(Error::Input("enough".into()))
    });
    assert_eq!((result.unwrap_err().to_string().as_str(), calls), ("enough", 1));
    assert!(model.decode(&latents(2)?).is_ok());
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let model = decoder()?;
    let wrong = Tensor::zeros((1, 4, 2, 3, 2), candle_core::DType::F32, &Device::Cpu)?;
    let error = model.decode(&wrong).unwrap_err().to_string();
    assert!(error.contains("expected [batch, 6, frames, height, width]"), "{error}");
    let tiling = Tiling { overlap_height: 0.3, ..TILING };
    let error = model.decode_tiled(&latents(1)?, &tiling).unwrap_err().to_string();
    assert!(error.contains("tile height 32 with overlap 0.3"), "{error}");
    // What fits in one tile is decoded as a whole.
    let latents = latents(3)?;
    let (whole, tiled) = (model.decode(&latents)?, model.decode_tiled(&latents, &TILING)?);
    assert_eq!(bits(&whole)?, bits(&tiled)?);
    Ok(())
}
