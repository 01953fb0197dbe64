//! What products with quantized weights and activations cost, by kind of layer: on what a trained transformer, the demo's,
//! gives its layers while it draws; and on inputs with outliers, which that has none of. `--nocapture` prints the tables. The codes are
//! those of all devices; sums are f32's.
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
const FORMS: [(Form, &str, f64); 5] = [
    (Form { of: Codes::Int8, activations: false }, "int8", 0.9999),
    (Form { of: Codes::Int8, activations: true }, "int8, activations too", 0.9995),
    // What `--int8-activations` makes of dense weights: layers of whole groups are rotated, others are not.
    (Form { of: Codes::RotatedInt8, activations: true }, "int8, activations too, rotated", 0.9995),
    (Form { of: Codes::Fp8, activations: false }, "fp8", 0.9995),
    (Form { of: Codes::Fp8, activations: true }, "fp8, activations too", 0.999),
];

#[derive(Clone, Copy)]
struct Form {
    of: Codes,
    activations: bool,
}

/// Rows as their codes have them: those of rotated rows stay rotated, which products with other such rows do not see.
fn coded(rows: &Tensor, of: Codes) -> candle_core::Result<Tensor> {
    let (count, width) = rows.dims2()?;
    let of = of.with_inputs(width);
    let values = rows.flatten_all()?.to_vec1::<f32>()?;
    let (mut codes, mut scales) = (vec![0; values.len()], vec![0f32; count]);
    of.quantize_rows(&values, width, &mut codes, &mut scales).unwrap();
    let number = |(at, &code): (usize, &u8)| {
        let code = if of == Codes::Fp8 { from_e4m3(code) } else { f32::from(code as i8) };
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
    coded: HashMap<&'static str, Tensor>,
    table: Table,
}

impl Side for Probe {
    fn add(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let right = x.matmul(&self.weight.t()?)?;
        for (at, (form, ..)) in FORMS.iter().enumerate() {
            let x = if form.activations { coded(x, form.of)? } else { x.clone() };
            let found = x.matmul(&self.coded[form.of.name()].t()?)?;
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
        let coded = FORMS.map(|(form, ..)| Ok((form.of.name(), coded(&weight, form.of)?)));
        let coded = coded.into_iter().collect::<Result<HashMap<_, _>>>()?;
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

/// Channels whose inputs are far larger than the rest: one alone in its group, two in another, one behind them.
const OUTLIERS: [usize; 4] = [77, 1025, 1030, 2900];

#[test]
fn rotation_guards_products_in_int8_against_outliers() -> Result<()> {
    const DIMS: (usize, usize, usize) = (96, 128, 3072);
    let dev = Device::Cpu;
    let (rows, outputs, inputs) = DIMS;
    let normal = |seed, len: usize, shape| Tensor::from_vec(torch_normal(seed, len), shape, &dev);
    println!(
        "| outliers | int8, activations too | rotated | weights alone | weights alone, rotated |"
    );
    println!("|--:|--:|--:|--:|--:|");
    // Weights that are alike, so that outliers are most of the output; and such as are as much smaller where outliers are, so that all
    // channels count. The rounding of weights alone costs more then: `|x|` is mostly outliers, and the output is not.
    let all = [1f32, 20., 50., 100.].map(|factor| [(factor, true), (factor, false)]);
    for (factor, alike) in all.into_iter().flatten() {
        let spread = |larger: f32| {
            let mut of = vec![1f32; inputs];
            OUTLIERS.iter().for_each(|&at| of[at] = larger);
            Tensor::from_vec(of, (1, inputs), &dev)
        };
        let mut x = normal(1, rows * inputs, (rows, inputs))?.flatten_all()?.to_vec1::<f32>()?;
        for row in x.chunks_exact_mut(inputs) {
            // They keep their sign and about their size, as those of trained transformers do.
            OUTLIERS.iter().for_each(|&at| row[at] = 1. + row[at] / 8.);
        }
        let x = Tensor::from_vec(x, (rows, inputs), &dev)?.broadcast_mul(&spread(factor)?)?;
        let weight = normal(2, outputs * inputs, (outputs, inputs))?;
        let weight = weight.broadcast_mul(&spread(if alike { 1. } else { 1. / factor })?)?;
        let right = x.matmul(&weight.t()?)?;
        let of = |of: Codes, activations: bool| -> Result<Sums> {
            let w = coded(&weight, of)?;
            let found = match (activations, of) {
                (true, _) => coded(&x, of)?.matmul(&w.t()?)?,
                (false, Codes::RotatedInt8) => rotated(&x)?.matmul(&w.t()?)?,
                (false, _) => x.matmul(&w.t()?)?,
            };
            let mut sums = Sums::default();
            sums.add(&right, &found)?;
            Ok(sums)
        };
        let all = [
            of(Codes::Int8, true)?,
            of(Codes::RotatedInt8, true)?,
            of(Codes::Int8, false)?,
            of(Codes::RotatedInt8, false)?,
        ];
        let cells = all.map(|s| format!(" {:.5}, {:.2} % |", s.cosine(), 100. * s.relative()));
        let kind = if alike { "weights alike" } else { "weights smaller" };
        println!("| {factor} times, {kind} |{}", cells.concat());
        let [plain, guarded, ..] = all.map(|sums| sums.cosine());
        let least = if alike { 0.999 } else { 0.998 };
        assert!(guarded >= least, "{factor} times, {kind}: rotated, cosine {guarded}");
        assert!(factor < 50. || plain < 0.999, "{factor} times, {kind}: cosine {plain}");
    }
    Ok(())
}

fn rotated(rows: &Tensor) -> candle_core::Result<Tensor> {
    let mut values = rows.flatten_all()?.to_vec1::<f32>()?;
    let (_, width) = rows.dims2()?;
    values.chunks_exact_mut(width).for_each(mmgp_quant::rotate);
    Tensor::from_vec(values, rows.shape(), rows.device())
}
