//! A FLUX of true width, 3 double and 5 single blocks, with two blocks of T5-XXL beside it: whatever the
//! budget, the way of the bytes and the order of the models, the bits are those of the resident run; and
//! loading, running and dropping it again and again leaves nothing behind.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use candle_core::{DType, Device, Tensor};
use mmgp_benches::random;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_lora::{Adapter, AdapterSet, StepWeights, Unfit};
use mmgp_models::{
    flux::{FluxConfig, FluxInputs, FluxTransformer, latents},
    text::t5::{T5Config, T5Encoder},
};
use mmgp_quant::QuantPolicy;
use mmgp_residency::{
    Budget, Budgets, Bytes, Cuda, CudaOptions, Error, Files, ModelBuilder, Pager, Transfers,
};
use mmgp_synth::{Flux, Folder, Options};

/// Devices that are opened, each with other options, and runs on each: 200 configurations.
const DEVICES: u64 = 40;
const RUNS: u64 = 5;
const CYCLES: usize = 200;
/// Cycles after which whatever is made once was made.
const SETTLED: usize = 10;
/// What may be page-locked beside the weights that stream, as a part of them: whole pages, and small tensors
/// that lie between large ones.
const BETWEEN: u64 = 100;
const MOST_GROWTH: u64 = 32 << 20;
const SIDE: usize = 8;
const TEXT: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Form {
    Bf16,
    Int8,
}

/// The pipeline's folder, its int8 files and an adapter; in memory that stands in for a disk if there is some.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_path_buf() } else { env::temp_dir() };
        let place = Self { dir: tempfile::tempdir_in(base).unwrap() };
        let options = Options { seed: 7, shard_bytes: 2 << 30 };
        Folder::flux(Flux::Dev, 3, 5, 2).write(&place.folder(), &options, |_| ()).unwrap();
        for model in ["transformer", "text_encoder_2"] {
            let pager = Pager::new(&Device::Cpu).unwrap();
            let _model = place.model(&pager, model, Form::Bf16, true);
            let file = place.int8(model);
            pager.save(model, &file, &BTreeMap::new(), Overwrite::No).unwrap();
        }
        place.write_adapter();
        place
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("pipeline")
    }

    fn int8(&self, model: &str) -> PathBuf {
        self.dir.path().join(format!("{model}-int8.safetensors"))
    }

    fn adapter(&self) -> PathBuf {
        self.dir.path().join("adapter.safetensors")
    }

    fn write_adapter(&self) {
        const RANK: usize = 16;
        let mut specs = Vec::new();
        for (layer, inputs, outputs) in [
            ("transformer_blocks.1.attn.to_q", 3072, 3072),
            ("transformer_blocks.2.ff.net.2", 12288, 3072),
            ("single_transformer_blocks.0.proj_mlp", 3072, 12288),
            ("single_transformer_blocks.4.attn.to_k", 3072, 3072),
        ] {
            let spec = |part: &str, shape: [usize; 2]| {
                let name = format!("transformer.{layer}.lora_{part}.weight");
                TensorSpec::new(name, Dtype::F32, shape)
            };
            specs.extend([spec("A", [RANK, inputs]), spec("B", [outputs, RANK])]);
        }
        let no = Overwrite::No;
        let mut writer = Writer::create(self.adapter(), &specs, &BTreeMap::new(), no).unwrap();
        for (seed, spec) in specs.iter().enumerate() {
            let count = spec.shape.iter().product();
            let values: Vec<f32> = random(count, seed as u64).iter().map(|v| v * 0.1).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write(&spec.name, &bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    fn model(&self, pager: &Pager, name: &str, form: Form, quantize: bool) -> Model {
        let folder = self.folder().join(name);
        let checkpoint = match form {
            Form::Int8 => Checkpoint::open(self.int8(name)).unwrap(),
            Form::Bf16 => {
                Checkpoint::open_dir(&folder, &["diffusion_pytorch_model", "model"]).unwrap()
            }
        };
        let mut builder = ModelBuilder::new(pager, name, Arc::new(checkpoint));
        if quantize {
            builder.quantize(QuantPolicy::default());
        }
        let config = folder.join("config.json");
        match name {
            "transformer" => {
                let config = FluxConfig::from_file(config).unwrap();
                Model::Flux(Box::new(FluxTransformer::new(&config, builder).unwrap()))
            }
            _ => {
                let config = T5Config::from_file(config).unwrap();
                Model::T5(Box::new(T5Encoder::new(&config, builder).unwrap()))
            }
        }
    }
}

enum Model {
    Flux(Box<FluxTransformer>),
    T5(Box<T5Encoder>),
}

impl Model {
    /// The bits of a pass.
    fn run(&self, device: &Device) -> Result<Vec<u32>, mmgp_models::Error> {
        let noise = |seed, tokens: usize, width: usize| {
            Tensor::from_vec(random(tokens * width, seed), (1, tokens, width), device).unwrap()
        };
        let output = match self {
            Self::T5(model) => {
                let ids: Vec<u32> = (0..TEXT as u32).map(|i| i * 997 % 32_000).collect();
                let ids = Tensor::from_vec(ids, (1, TEXT), device).unwrap();
                model.forward(&ids, None)?
            }
            Self::Flux(model) => {
                let inputs = FluxInputs {
                    hidden_states: &noise(1, SIDE * SIDE, 64),
                    encoder_hidden_states: &noise(2, TEXT, 4096),
                    pooled_projections: &noise(3, 1, 768).squeeze(1).unwrap(),
                    timestep: &Tensor::new(&[0.7f32], device).unwrap(),
                    img_ids: &latents::image_ids(SIDE, SIDE, &Device::Cpu).unwrap(),
                    txt_ids: &latents::text_ids(TEXT, &Device::Cpu).unwrap(),
                    guidance: Some(&Tensor::new(&[3.5f32], device).unwrap()),
                };
                model.forward(&inputs)?
            }
        };
        let values = output.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.is_finite()));
        Ok(values.into_iter().map(f32::to_bits).collect())
    }
}

/// Both models on one pager, and the adapter beside the transformer.
struct Pair {
    set: AdapterSet,
    flux: Model,
    t5: Model,
}

impl Pair {
    fn new(place: &Place, pager: &Pager, form: Form) -> Self {
        let flux = place.model(pager, "transformer", form, false);
        let t5 = place.model(pager, "text_encoder_2", form, false);
        Self { set: AdapterSet::new(pager, &["transformer"]), flux, t5 }
    }

    /// `false` if the budget is too small for it.
    fn adapt(&mut self, place: &Place) -> bool {
        let adapter = Adapter::open(place.adapter()).unwrap();
        match self.set.load(&[(adapter, StepWeights::default())], Unfit::Fail) {
            Ok(_) => true,
            Err(mmgp_lora::Error::Residency(Error::BudgetTooSmall { .. })) => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Has the GPU's kernels used, as the command does.
fn use_kernels(device: &Device) {
    let Device::Cuda(device) = device else { panic!("no GPU") };
    mmgp_models::nn::cuda::enable_tested(device).unwrap();
}

/// The bits of resident passes.
struct References {
    t5: BTreeMap<Form, Vec<u32>>,
    flux: BTreeMap<(Form, bool), Vec<u32>>,
}

impl References {
    fn new(place: &Place) -> Self {
        let mut all = Self { t5: BTreeMap::new(), flux: BTreeMap::new() };
        let pager = Pager::over(Cuda::new(&CudaOptions::default()).unwrap()).unwrap();
        let device = pager.device().candle().clone();
        use_kernels(&device);
        for form in [Form::Bf16, Form::Int8] {
            let pager = pager.beside().unwrap();
            let mut pair = Pair::new(place, &pager, form);
            pager.plan(Budget::Unlimited).unwrap();
            all.t5.insert(form, pair.t5.run(&device).unwrap());
            all.flux.insert((form, false), pair.flux.run(&device).unwrap());
            assert!(pair.adapt(place));
            all.flux.insert((form, true), pair.flux.run(&device).unwrap());
        }
        let mut distinct: Vec<&Vec<u32>> = all.flux.values().collect();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 4, "forms and the adapter change the result");
        all
    }
}

/// xorshift: the same configurations each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    fn options(&mut self) -> CudaOptions {
        CudaOptions {
            locked: self.one(&[None, None, Some(Bytes(0)), Some(Bytes(400_000_000))]),
            files: self.one(&[Files::Registered, Files::Copied]),
            buffers: 2 + self.below(5) as usize,
            buffer: Bytes(self.one(&[1 << 16, 1 << 20, 24 << 20])),
            transfers: self.one(&[
                Transfers::Overlapped,
                Transfers::Overlapped,
                Transfers::Synchronous,
            ]),
            poisons: self.below(4) == 0,
            vram_limit: self.one(&[None, None, Some(Bytes(12_000_000_000))]),
            ..CudaOptions::default()
        }
    }

    /// Budgets of both models: from the least that works to more than there is.
    fn budgets(&mut self, minimum: Bytes, weights: Bytes) -> Budgets {
        let between = |share: u64| Bytes(minimum.0 + (weights.0 - minimum.0) * share / 100);
        let total = match self.below(5) {
            0 => Budget::Min,
            1 => Budget::Unlimited,
            _ => Budget::Bytes(between(self.below(110))),
        };
        let mut budgets = Budgets::from(total);
        if self.below(3) == 0 {
            let cap = Budget::AtLeastMin(Bytes(self.below(weights.0)));
            budgets.models.push(("transformer".into(), cap));
        }
        budgets
    }
}

fn seed() -> u64 {
    env::var("MMGP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x9e37_79b9)
}

#[test]
fn two_hundred_configurations_have_the_bits_of_the_resident_run() {
    let place = Place::new();
    let references = References::new(&place);
    let mut random = Random(seed());
    let (mut passes, mut streamed) = (0, 0);
    let begun = Instant::now();
    for at in 0..DEVICES {
        println!("{at} of {DEVICES} devices after {:.0?}", begun.elapsed());
        let options = random.options();
        let first = Pager::over(Cuda::new(&options).unwrap()).unwrap();
        let device = first.device().candle().clone();
        for run in 0..RUNS {
            let form = random.one(&[Form::Bf16, Form::Int8]);
            let pager = first.beside().unwrap();
            let mut pair = Pair::new(&place, &pager, form);
            let least = pager.plan(Budget::Min).unwrap();
            let budgets = random.budgets(least.minimum, least.weights);
            // The largest budget that was in force.
            let mut most = pager.plan(budgets.clone()).unwrap().budget.0;
            let mut adapted = false;
            let mut told = vec![format!("{options:?}\n{form:?} {budgets:?}")];
            for pass in 0..3 + random.below(4) {
                match random.below(12) {
                    0 => {
                        pager.begin_run();
                        told.push("another run".into());
                    }
                    1 => {
                        let budgets = random.budgets(least.minimum, least.weights);
                        told.push(format!("{budgets:?}"));
                        // What fitted without the adapter may not with it.
                        match pager.plan(budgets) {
                            Ok(plan) => most = most.max(plan.budget.0),
                            Err(Error::BudgetTooSmall { .. }) if adapted => {}
                            Err(error) => panic!("{error}: {told:#?}"),
                        }
                    }
                    2 => {
                        adapted |= pair.adapt(&place);
                        told.push(format!("adapted: {adapted}"));
                    }
                    3 if adapted => {
                        pair.set.clear().unwrap();
                        adapted = false;
                        told.push("cleared".into());
                    }
                    _ => {}
                }
                let flux = random.below(3) > 0;
                told.push(if flux { "transformer".into() } else { "encoder".into() });
                let (ran, expected) = match flux {
                    true => (pair.flux.run(&device), &references.flux[&(form, adapted)]),
                    false => (pair.t5.run(&device), &references.t5[&form]),
                };
                let bits = ran.unwrap_or_else(|e| {
                    panic!("run {run}, pass {pass}: {e}\n{told:#?}\n{}", pager.report())
                });
                assert!(bits == *expected, "run {run}, pass {pass}: other bits\n{told:#?}");
                passes += 1;
                // A budget that is the least grows with what is attached.
                most = most.max(pager.plan_in_force().unwrap().budget.0);
            }
            let report = pager.report();
            streamed += report.streamed.0;
            assert!(report.peak.0 <= most, "{report}\n{told:#?}");
        }
    }
    println!("{} configurations, {passes} passes, {} streamed", DEVICES * RUNS, Bytes(streamed));
    assert!(streamed > 100_000_000_000);
}

fn resident_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

fn free(device: &Device) -> u64 {
    let Device::Cuda(device) = device else { panic!("no GPU") };
    device.cuda_stream().context().mem_get_info().unwrap().0 as u64
}

#[test]
fn two_hundred_lives_of_a_model_leave_nothing_behind() {
    let place = Place::new();
    let mut random = Random(seed());
    let cuda = Cuda::new(&CudaOptions { compute: DType::BF16, ..CudaOptions::default() }).unwrap();
    let locked = cuda.locked_counter();
    let first = Pager::over(cuda).unwrap();
    let device = first.device().candle().clone();
    use_kernels(&device);
    let mut settled = None;
    for cycle in 0..CYCLES {
        let pager = first.beside().unwrap();
        let form = random.one(&[Form::Bf16, Form::Int8]);
        let flux = place.model(&pager, "transformer", form, false);
        let least = pager.plan(Budget::Min).unwrap();
        pager.plan(random.budgets(least.minimum, least.weights)).unwrap();
        flux.run(&device).unwrap();
        // What is page-locked is what streams under the plan, in whole pages.
        let plan = pager.plan_in_force().unwrap();
        let model = &plan.models[0];
        let alone = model.slots.iter().filter(|slot| !slot.turns);
        let streams = model.bytes.0 - alone.map(|slot| slot.capacity.0).sum::<u64>();
        let found = locked().0;
        let most = streams + streams / BETWEEN;
        assert!(found >= streams && found <= most, "{plan}: {found} locked, {streams} stream");
        drop(flux);
        drop(pager);
        assert_eq!(locked(), Bytes(0), "cycle {cycle}");
        if cycle == SETTLED {
            settled = Some((free(&device), resident_memory()));
        }
    }
    let (free_then, resident_then) = settled.unwrap();
    let (free_now, resident_now) = (free(&device), resident_memory());
    println!(
        "after {SETTLED} and {CYCLES} cycles: {} and {} of VRAM free, {} and {} resident",
        Bytes(free_then),
        Bytes(free_now),
        Bytes(resident_then),
        Bytes(resident_now)
    );
    assert!(free_now + MOST_GROWTH >= free_then);
    assert!(resident_now <= resident_then + MOST_GROWTH);
}
