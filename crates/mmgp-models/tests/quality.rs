//! What products with quantized weights and activations cost, by kind of layer: on what a trained transformer, the demo's,
//! gives its layers while it draws. `--nocapture` prints the table. The codes are those of all devices; sums are f32's.
#![allow(clippy::unwrap_used)] // helpers of tests may panic

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use candle_core::{Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::{
    flux::{FluxConfig, FluxInputs, FluxTransformer, latents},
    noise::torch_normal,
    schedulers::flow_match_euler::{FlowMatchConfig, FlowMatchEuler, Request, linspace_sigmas},
};
use mmgp_quant::{Codes, Side, TargetPart, from_e4m3};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const STEPS: usize = 8;

/// What is quantized, and the least cosine that any kind of layer may have then.
const FORMS: [(Form, &str, f64); 4] = [
    (Form { of: Codes::Int8, activations: false }, "int8", 0.9999),
    (Form { of: Codes::Int8, activations: true }, "int8, activations too", 0.9995),
    (Form { of: Codes::Fp8, activations: false }, "fp8", 0.9995),
    (Form { of: Codes::Fp8, activations: true }, "fp8, activations too", 0.999),
];

#[derive(Clone, Copy)]
struct Form {
    of: Codes,
    activations: bool,
}

/// Rows as their codes have them.
fn coded(rows: &Tensor, of: Codes) -> candle_core::Result<Tensor> {
    let (count, width) = rows.dims2()?;
    let values = rows.flatten_all()?.to_vec1::<f32>()?;
    let (mut codes, mut scales) = (vec![0; values.len()], vec![0f32; count]);
    of.quantize_rows(&values, width, &mut codes, &mut scales).unwrap();
    let number = |(at, &code): (usize, &u8)| {
        let code = if of == Codes::Int8 { f32::from(code as i8) } else { from_e4m3(code) };
        code * scales[at / width]
    };
    Tensor::from_vec(codes.iter().enumerate().map(number).collect(), (count, width), rows.device())
}

/// Sums over all outputs of a kind of layer: of squares, of products with what they should be, of squared errors.
#[derive(Clone, Copy, Default)]
struct Sums {
    right: f64,
    found: f64,
    both: f64,
    error: f64,
}

impl Sums {
    fn add(&mut self, right: &Tensor, found: &Tensor) -> candle_core::Result<()> {
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        for (right, found) in values(right)?.into_iter().zip(values(found)?) {
            let (right, found) = (f64::from(right), f64::from(found));
            self.right += right * right;
            self.found += found * found;
            self.both += right * found;
            self.error += (right - found).powi(2);
        }
        Ok(())
    }

    fn cosine(&self) -> f64 {
        self.both / (self.right * self.found).sqrt()
    }

    fn relative(&self) -> f64 {
        (self.error / self.right).sqrt()
    }
}

type Table = Arc<Mutex<BTreeMap<String, [Sums; FORMS.len()]>>>;

/// Looks on in a layer, to which it adds nothing.
struct Probe {
    kind: String,
    weight: Tensor,
    coded: [Tensor; 2],
    table: Table,
}

impl Side for Probe {
    fn add(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let right = x.matmul(&self.weight.t()?)?;
        for (at, (form, ..)) in FORMS.iter().enumerate() {
            let x = if form.activations { coded(x, form.of)? } else { x.clone() };
            let weight = &self.coded[usize::from(form.of == Codes::Fp8)];
            let found = x.matmul(&weight.t()?)?;
            let mut table = self.table.lock().unwrap();
            table.entry(self.kind.clone()).or_default()[at].add(&right, &found)?;
        }
        Ok(y)
    }
}

/// A layer's name without its block's number; joined ones have the first's.
fn kind(parts: &[TargetPart]) -> String {
    let words = parts[0].name.split('.').filter(|word| word.parse::<usize>().is_err());
    let name = words.collect::<Vec<_>>().join(".");
    if parts.len() > 1 { format!("{name} and {} more", parts.len() - 1) } else { name }
}

fn assets(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

#[test]
fn quantized_products_keep_the_direction_of_each_kind_of_layer() -> Result<()> {
    let dev = Device::Cpu;
    let path = assets("tiny-flux-reference").join("reference.safetensors");
    let reference: HashMap<String, Tensor> = candle_core::safetensors::load(path, &dev)?;
    let dir = assets("tiny-flux/transformer");
    let files = Arc::new(Checkpoint::open_dir(&dir, &["diffusion_pytorch_model"])?);
    let pager = Pager::new(&dev)?;
    let builder = ModelBuilder::new(&pager, "transformer", files);
    let flux = FluxTransformer::new(&FluxConfig::from_file(dir.join("config.json"))?, builder)?;
    pager.plan(Budget::Unlimited)?;

    let weights = dir.join("diffusion_pytorch_model.safetensors");
    let weights: HashMap<String, Tensor> = candle_core::safetensors::load(weights, &dev)?;
    let table = Table::default();
    for target in pager.targets("transformer").ok_or("no targets")? {
        let target = target.target;
        let name = |part: &TargetPart| format!("{}.weight", part.name);
        let parts: Vec<Tensor> = target.parts.iter().map(|p| weights[&name(p)].clone()).collect();
        let weight = Tensor::cat(&parts, 0)?.to_dtype(candle_core::DType::F32)?;
        let coded = [coded(&weight, Codes::Int8)?, coded(&weight, Codes::Fp8)?];
        let (kind, table) = (kind(&target.parts), table.clone());
        target.side.set(Arc::new(Probe { kind, weight, coded, table }));
    }

    let scheduler = assets("tiny-flux/scheduler/scheduler_config.json");
    let scheduler = FlowMatchEuler::new(FlowMatchConfig::from_file(scheduler)?)?;
    let sigmas = linspace_sigmas(STEPS);
    let schedule = scheduler.schedule(&Request { sigmas: Some(&sigmas), ..Default::default() })?;
    let noise = Tensor::from_vec(torch_normal(42, 16 * 16 * 16), (1, 16, 16, 16), &dev)?;
    let (img_ids, txt_ids) = (latents::image_ids(8, 8, &dev)?, latents::text_ids(32, &dev)?);
    for prompt in 0..3 {
        let mut sample = latents::pack(&noise)?;
        for (at, &timestep) in schedule.timesteps().iter().enumerate() {
            let velocity = flux.forward(&FluxInputs {
                hidden_states: &sample,
                encoder_hidden_states: &reference[&format!("p{prompt}.prompt_embeds")],
                pooled_projections: &reference[&format!("p{prompt}.pooled")],
                timestep: &Tensor::new(&[timestep / 1000.], &dev)?,
                img_ids: &img_ids,
                txt_ids: &txt_ids,
                guidance: None,
            })?;
            sample = schedule.step(at, &velocity, &sample)?;
        }
    }

    let table = table.lock().unwrap();
    println!("| layers |{}", FORMS.map(|(_, name, _)| format!(" {name} |")).concat());
    println!("|---|{}", FORMS.map(|_| "--:|").concat());
    for (kind, sums) in table.iter() {
        let cells = sums.map(|s| format!(" {:.5}, {:.2} % |", s.cosine(), 100. * s.relative()));
        println!("| `{kind}` |{}", cells.concat());
    }
    assert!(table.len() > 12, "{} kinds of layers", table.len());
    for (kind, sums) in table.iter() {
        for (sums, (_, form, least)) in sums.iter().zip(FORMS) {
            assert!(sums.cosine() >= least, "{kind}, {form}: cosine {}", sums.cosine());
        }
    }
    Ok(())
}
