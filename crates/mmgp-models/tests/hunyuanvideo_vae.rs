//! HunyuanVideo's decoder where the golden case says nothing: one latent frame, tiles of space and time
//! with their blending, and frames that come tile by tile.
//!
//! What diffusers computes is in `hunyuanvideo_vae.safetensors`, made by `hunyuanvideo_vae.py`:
//! `NAME.latents`, and some of the decoded frames as `NAME.frames`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::{
    Error,
    hunyuanvideo::{HunyuanVideoDecoder, HunyuanVideoVaeConfig, Tile, Tiling},
};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SPACE: Option<[Tile; 2]> =
    Some([Tile { size: 32, stride: 24 }, Tile { size: 24, stride: 16 }]);
const SHORT: Tile = Tile { size: 8, stride: 4 };

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/models/vae-hunyuan-video")
}

fn config() -> Result<HunyuanVideoVaeConfig> {
    Ok(HunyuanVideoVaeConfig::from_file(folder().join("config.json"))?)
}

fn decoder() -> Result<HunyuanVideoDecoder> {
    let pager = Pager::new(&Device::Cpu)?;
    let checkpoint = Arc::new(Checkpoint::open(folder().join("model.safetensors"))?);
    let builder = ModelBuilder::new(&pager, "vae", checkpoint);
    let model = HunyuanVideoDecoder::new(&config()?, builder)?;
    pager.plan(Budget::Min)?;
    Ok(model)
}

fn latents(frames: usize) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1., (1, 8, frames, 3, 2), &Device::Cpu)?)
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

#[test]
fn frames_are_those_of_diffusers() -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hunyuanvideo_vae.safetensors");
    let golden = candle_core::safetensors::load(file, &Device::Cpu)?;
    let model = decoder()?;
    let (whole, both) = (Tiling::of_time(), Tiling { space: SPACE, frames: SHORT });
    for (name, count, frames, tiling) in [
        ("one", 1, &[0u32][..], whole),
        ("time", 25, &[0, 12, 13, 14, 16, 17, 24], whole),
        ("space", 5, &[0, 4], Tiling { space: SPACE, ..whole }),
        ("both", 17, &[0, 4, 5, 7, 8, 9, 16], both),
        ("wide", 1, &[0], both),
    ] {
        let latents = &golden[&format!("{name}.latents")];
        let got = model.decode(latents, &tiling)?;
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
fn tiles_of_time_are_the_whole() -> Result<()> {
    let model = decoder()?;
    let short = Tiling { frames: SHORT, ..Tiling::default() };
    for (frames, tiling, expected) in [
        (1, Tiling::default(), &[1][..]),
        (4, Tiling::default(), &[13]),
        (5, Tiling::default(), &[13, 4]),
        (7, Tiling::default(), &[13, 12]),
        (9, Tiling::default(), &[13, 12, 8]),
        (2, short, &[5]),
        (5, short, &[5, 4, 4, 4]),
        // Tiles that share nothing, and such that share more than they keep.
        (5, Tiling { frames: Tile { size: 8, stride: 8 }, ..short }, &[9, 8]),
        (5, Tiling { frames: Tile { size: 12, stride: 4 }, ..short }, &[5, 4, 4, 4]),
    ] {
        let latents = latents(frames)?;
        let mut parts = Vec::new();
        model.decode_frames(&latents, &tiling, |part| {
            parts.push(part);
            Ok(())
        })?;
        let counts = parts.iter().map(|p| p.dim(2)).collect::<candle_core::Result<Vec<_>>>()?;
        assert_eq!(counts, expected, "{frames} {tiling:?}");
        assert_eq!(config()?.frames(frames), counts.iter().sum::<usize>());
        let whole = model.decode(&latents, &tiling)?;
        assert_eq!(bits(&Tensor::cat(&parts, 2)?)?, bits(&whole)?);
        // Later latents change nothing but what their own tile holds.
        if frames == 9 {
            let first = model.decode(&latents.narrow(2, 0, 6)?, &tiling)?;
            let same = |t: &Tensor| bits(&t.narrow(2, 0, 13)?.contiguous()?);
            assert_eq!(same(&first)?, same(&whole)?);
        }
    }
    Ok(())
}

#[test]
fn a_caller_can_stop() -> Result<()> {
    let model = decoder()?;
    let (mut calls, tiling) = (0, Tiling::default());
    let result = model.decode_frames(&latents(9)?, &tiling, |_| {
        calls += 1;
        Err(Error::Input("enough".into()))
    });
    assert_eq!((result.unwrap_err().to_string().as_str(), calls), ("enough", 1));
    assert!(model.decode(&latents(2)?, &tiling).is_ok());
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let model = decoder()?;
    let whole = Tiling::of_time();
    for shape in [&[1, 4, 2, 3, 2][..], &[1, 8, 0, 3, 2], &[0, 8, 2, 3, 2], &[8, 2, 3, 2]] {
        let wrong = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        let error = model.decode(&wrong, &whole).unwrap_err().to_string();
        assert!(error.contains("expected [batch, 8, frames, height, width]"), "{error}");
    }
    let good = Tile { size: 32, stride: 24 };
    for (tiling, what) in [
        (Tiling { frames: Tile { size: 16, stride: 10 }, ..whole }, "tile frames 16, one every 10"),
        (Tiling { frames: Tile { size: 0, stride: 0 }, ..whole }, "tile frames 0"),
        (
            Tiling { space: Some([good, Tile { size: 36, stride: 24 }]), ..whole },
            "tile width 36, one every 24: expected multiples of 8",
        ),
        (Tiling { space: Some([Tile { size: 24, stride: 32 }, good]), ..whole }, "tile height 24"),
    ] {
        let error = model.decode(&latents(1)?, &tiling).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    // What fits in one tile is decoded as a whole.
    let latents = latents(3)?;
    let (whole, tiled) =
        (model.decode(&latents, &whole)?, model.decode(&latents, &Tiling::default())?);
    assert_eq!(bits(&whole)?, bits(&tiled)?);
    Ok(())
}
