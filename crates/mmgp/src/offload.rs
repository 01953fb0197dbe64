//! The facade: a device, settings and budgets, models under names, adapters beside them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use mmgp_io::{Checkpoint, Overwrite};
use mmgp_lora::{Adapter, AdapterArg, AdapterSet, Skipped, StepWeights, Steps, Unfit};
use mmgp_models::{
    Activations, Event, Latents, ModelIndex, OpenOptions, Output, Picture, Pipeline, Replaced,
    Request, open_pipeline,
};
use mmgp_profiles::{Profile, QuantizationType, Settings, Switch};
use mmgp_quant::Codes;
use mmgp_residency::{
    Budget, Budgets, Bytes, Forecast, ModelBuilder, Paged, Pager, Plan, Report, check_pageable,
};

use crate::{
    DeviceChoice, Entry, Error, Result, Store,
    device::{GpuUse, Opened},
    pace::Pace,
    times::Times,
};

/// Models whose adapters a LoRA file may hold; the first is meant where a file names none.
const ADAPTED: [&str; 3] = ["transformer", "text_encoder", "text_encoder_2"];

/// Models that share one device and its budgets.
pub struct Offload {
    pager: Pager,
    settings: Settings,
    activations: Activations,
    weights_for: Activations,
    budgets: Budgets,
    adapters: Option<AdapterSet>,
    store: Option<Stored>,
    times: Times,
}

/// A store, and who hears of what is put into it.
struct Stored {
    store: Store,
    tell: Box<dyn Fn(&str)>,
}

/// Collects what an [`Offload`] needs.
pub struct OffloadBuilder {
    device: DeviceChoice,
    settings: Settings,
    budgets: Budgets,
    store: Option<Stored>,
    gpu: GpuUse,
    weights_for: Activations,
}

impl OffloadBuilder {
    /// The device to run on; [`DeviceChoice::Auto`] by default.
    #[must_use]
    pub fn device(mut self, device: DeviceChoice) -> Self {
        self.device = device;
        self
    }

    /// The limit on all weights on the device at one moment; [`Budget::Auto`] by default.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budgets.total = budget;
        self
    }

    /// The most VRAM that the whole process takes, activations and the driver's own included: a small card
    /// for a large one to stand in for. Needs a GPU.
    #[must_use]
    pub fn vram_limit(mut self, limit: Bytes) -> Self {
        self.gpu.vram_limit = Some(limit);
        self
    }

    /// Bytes a second at which blocks are copied to the GPU at most: a slow link for a fast one to stand in
    /// for. Needs a GPU.
    #[must_use]
    pub fn link_limit(mut self, limit: Bytes) -> Self {
        self.gpu.link_limit = Some(limit);
        self
    }

    /// What products with int8 or fp8 weights take of their input. [`Activations::Int8`] is faster on GPUs that multiply
    /// int8 by int8, with an error of about 1.2 % in each product of normal values, where dense weights that become int8 are
    /// rotated against outliers; [`Activations::Fp8`] on those of
    /// compute capability 9.0, with one of about 3.7 %. Both need a GPU.
    #[must_use]
    pub fn activations(mut self, activations: Activations) -> Self {
        self.gpu.activations = activations;
        self
    }

    /// A program that, started as `program compile-kernels NAME ORDINAL`, comes to `compile_kernels` of this crate,
    /// as the command does. Of the tensor library's kernels there is no machine code: when a GPU is first used on a machine
    /// the driver compiles them, and whatever else the process asks of it waits meanwhile: 1.4 s for the longest of them on one machine.
    /// All run at once where there is room, each with a context on the GPU. A program that does something else with such
    /// arguments is refused when it comes here again. By default, and without a GPU, none is started.
    #[must_use]
    pub fn kernel_compiler(mut self, program: impl Into<PathBuf>) -> Self {
        self.gpu.compiler = Some(program.into());
        self
    }

    /// What products will take of their input where the weights are used that are quantized here: for
    /// [`Offload::convert`], which needs no GPU. Those for [`Activations::Int8`] are rotated against outliers.
    #[must_use]
    pub fn weights_for(mut self, activations: Activations) -> Self {
        self.weights_for = activations;
        self
    }

    /// A cap of one model beside the budget of all.
    #[must_use]
    pub fn model_budget(mut self, model: &str, budget: Budget) -> Self {
        self.budgets.models.push((model.to_string(), budget));
        self
    }

    /// One of the five presets, or settings of one's own; by default nothing is quantized.
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Keeps what is quantized on the fly in `store` and takes it from there the next time; `tell`
    /// hears a line for each model that is put into it. What passes cost is kept there too, so that the first
    /// plan of a later start on this machine is made with it ([`Offload::plan_for`]). By default nothing is kept.
    #[must_use]
    pub fn store(mut self, store: Store, tell: impl Fn(&str) + 'static) -> Self {
        self.store = Some(Stored { store, tell: Box::new(tell) });
        self
    }

    /// Starts the pager. Nothing is read.
    ///
    /// # Errors
    /// A device that this build cannot page on.
    pub fn build(self) -> Result<Offload> {
        let gpu = GpuUse {
            locked_share: self.settings.perc_reserved_mem_max.get().map(|share| share.get()),
            synchronous: *self.settings.async_transfers.get() == Switch::Off,
            ..self.gpu
        };
        let Opened { pager, machine } = self.device.open(&gpu)?;
        Ok(Offload {
            pager,
            activations: gpu.activations,
            weights_for: self.weights_for,
            times: Times::new(self.store.as_ref().map(|s| s.store.times()), machine, &gpu),
            settings: self.settings,
            budgets: self.budgets,
            adapters: None,
            store: self.store,
        })
    }
}

impl Offload {
    /// Starts with [`DeviceChoice::Auto`] and [`Budget::Auto`].
    pub fn builder() -> OffloadBuilder {
        let settings = Settings::default();
        OffloadBuilder {
            device: DeviceChoice::Auto,
            settings,
            budgets: Budget::Auto.into(),
            store: None,
            gpu: GpuUse::default(),
            weights_for: Activations::default(),
        }
    }

    /// A pipeline held as one of the five presets says, in one line.
    ///
    /// # Errors
    /// Those of [`pipeline`](Self::pipeline) and [`plan`](Self::plan).
    pub fn profile(
        pipeline: impl AsRef<Path>,
        profile: Profile,
    ) -> Result<(Self, Box<dyn Pipeline>)> {
        let mut offload = Self::builder().settings(profile.settings()).build()?;
        let pipeline = offload.pipeline(pipeline)?;
        offload.plan()?;
        Ok((offload, pipeline))
    }

    /// Opens a pipeline's folder; the settings say which of its models are quantized and what each
    /// may hold. Reads configs, tokenizers and headers, no weights.
    ///
    /// # Errors
    /// Anything in the folder that is missing, malformed or of an unknown class; settings that name
    /// models which the pipeline lacks.
    pub fn pipeline(&mut self, dir: impl AsRef<Path>) -> Result<Box<dyn Pipeline>> {
        let index = ModelIndex::read(dir.as_ref())?;
        let classes = index.classes();
        let quantize = self.settings.models_to_quantize(&classes)?;
        let codes = match self.settings.quantization_type.get() {
            QuantizationType::Qfloat8 => Codes::Fp8,
            _ => Codes::Int8,
        };
        let options = OpenOptions {
            quantize: quantize.into_iter().map(String::from).collect(),
            codes: codes.with_activations(self.weights_for.codes()),
            exclude: self.settings.quantize_exclude.get().clone(),
            activations: self.activations,
            replaced: Vec::new(),
        };
        let names: Vec<&str> = classes.iter().map(|(name, _)| *name).collect();
        let caps = self.settings.budgets_of(&names, self.budgets.total)?;
        self.budgets.models.extend(caps.models);
        let options = self.stored(dir.as_ref(), options)?;
        self.times.forget_models();
        Ok(open_pipeline(dir.as_ref(), &self.pager, &options)?)
    }

    /// `options` with the models that are quantized taken from the store, where they are made first if
    /// they are not there yet.
    fn stored(&self, dir: &Path, mut options: OpenOptions) -> Result<OpenOptions> {
        let Some(Stored { store, tell }) = &self.store else { return Ok(options) };
        if options.quantize.is_empty() {
            return Ok(options);
        }
        let making = Pager::new(&Device::Cpu)?;
        // It only writes weights, those that products with such activations read.
        let codes = options.codes.with_activations(options.activations.codes());
        let weights = OpenOptions { activations: Activations::default(), codes, ..options.clone() };
        let pipeline = open_pipeline(dir, &making, &weights)?;
        let sizes = making.plan(Budget::Min)?;
        let mut recipe = format!("{codes} but {:?}", options.exclude);
        // Digests are of blocks as they lie in slots, where norms and biases have the compute dtype.
        let compute = self.pager.device().compute_dtype();
        if compute != DType::F32 {
            recipe.push_str(&format!(", held in {compute:?}"));
        }
        for part in pipeline.parts().iter().filter(|p| options.quantize.iter().any(|q| q == p.name))
        {
            let source = dir.join(part.name);
            let path = store.place(&source, &recipe)?;
            let entry = match store.get(&path) {
                Some(entry) => entry,
                None => {
                    let size = sizes.models.iter().find(|m| m.name == part.name);
                    let size = size.map_or(Bytes(0), |m| m.bytes);
                    if !store.make_room(size)? {
                        tell(&format!(
                            "{} is quantized at each start: the store has no room for {size}",
                            part.name
                        ));
                        continue;
                    }
                    let saved = making.save(part.name, &path, &BTreeMap::new(), Overwrite::Yes)?;
                    if saved.quantized == 0 {
                        store.remove(&path); // quantized already, or nothing in it to quantize
                        continue;
                    }
                    let replaced = Replaced {
                        model: part.name.into(),
                        file: path.clone(),
                        digests: Vec::new(),
                    };
                    let reading = self.pager.beside()?;
                    let options =
                        OpenOptions { replaced: vec![replaced], ..OpenOptions::default() };
                    let _pipeline = open_pipeline(dir, &reading, &options)?;
                    let digests = reading.digests(part.name)?;
                    let entry = store.complete(&path, &source, &recipe, digests)?;
                    tell(&format!(
                        "kept {} for the next start: {} ({})",
                        part.name,
                        path.display(),
                        entry.bytes
                    ));
                    entry
                }
            };
            let Entry { path, digests, .. } = entry;
            options.replaced.push(Replaced { model: part.name.into(), file: path, digests });
        }
        Ok(options)
    }

    /// If `error` is about a damaged entry of the store, removes the entry: the next time the pipeline
    /// is opened, it is made anew.
    pub fn heal(&self, error: &Error) -> bool {
        use mmgp_residency::Error::Corrupt;
        match (error, &self.store) {
            (
                Error::Models(mmgp_models::Error::Residency(Corrupt { file, .. }))
                | Error::Residency(Corrupt { file, .. }),
                Some(stored),
            ) => stored.store.remove(file),
            _ => false,
        }
    }

    /// Loads an unmodified candle module under `name`, paged whole: its weights are on the device
    /// only while [`Module::run`] runs, or for as long as the budget has room for them.
    ///
    /// # Errors
    /// A file that cannot be read or trusted; a constructor that computes on its weights.
    pub fn module<M>(
        &self,
        name: &str,
        weights: impl AsRef<Path>,
        dtype: DType,
        build: impl Fn(VarBuilder<'_>) -> candle_core::Result<M>,
    ) -> Result<Module<M>> {
        let checkpoint = Arc::new(Checkpoint::open(weights)?);
        check_pageable(&self.pager, name, checkpoint.clone(), dtype, &build)?;
        let builder = ModelBuilder::new(&self.pager, name, checkpoint);
        let module = build(builder.var_builder(dtype))?;
        Ok(Module(builder.finish(module, Vec::new())?))
    }

    /// Puts LoRA files beside the models in place of those that were there, and makes the plan anew.
    /// What does not fit fails the call and leaves the set as it was, or is skipped and returned, as
    /// `unfit` says.
    ///
    /// # Errors
    /// Files that cannot be read or fit nothing; a budget that is too small with them.
    pub fn load_loras_into_model(
        &mut self,
        pipeline: &mut dyn Pipeline,
        files: &[AdapterArg],
        unfit: Unfit,
    ) -> Result<Vec<Skipped>> {
        let mut adapters = Vec::with_capacity(files.len());
        for AdapterArg { file, weights } in files {
            adapters.push((Adapter::open(file)?, weights.clone()));
        }
        let set = self.adapters.get_or_insert_with(|| {
            let present = self.pager.models();
            let models: Vec<&str> =
                ADAPTED.into_iter().filter(|name| present.iter().any(|p| p == name)).collect();
            AdapterSet::new(&self.pager, &models)
        });
        let skipped = set.load(&adapters, unfit)?;
        pipeline.forget_prompts();
        Ok(skipped)
    }

    /// Gives the loaded LoRAs other weights over the steps, in their order. Nothing is read.
    ///
    /// # Errors
    /// Another number of weights than of loaded files.
    pub fn activate_loras(
        &mut self,
        pipeline: &mut dyn Pipeline,
        weights: &[StepWeights],
    ) -> Result<()> {
        match &mut self.adapters {
            Some(set) => set.set_weights(weights)?,
            None if weights.is_empty() => {}
            None => {
                let found = weights.len();
                return Err(mmgp_lora::Error::WeightCount { expected: 0, found }.into());
            }
        }
        pipeline.forget_prompts();
        Ok(())
    }

    /// Draws with `pipeline`: [`denoise`](Self::denoise) and [`decode`](Self::decode), with all frames in
    /// memory.
    ///
    /// # Errors
    /// Those of both.
    pub fn generate(
        &self,
        pipeline: &mut dyn Pipeline,
        request: &Request,
        tell: &mut dyn FnMut(Event),
    ) -> Result<Output> {
        let latents = self.denoise(pipeline, request, tell)?;
        let mut frames = Vec::new();
        self.decode(pipeline, request, &latents, tell, &mut |frame| {
            frames.push(frame);
            Ok(())
        })?;
        Ok(Output { latents, frames })
    }

    /// From the prompt to latents, the LoRAs at their weights for each step. Tells of each step when it is over
    /// on the device ([`Event::Stepped`]), and queues at most one ahead of it.
    ///
    /// # Errors
    /// Those of [`Pipeline::denoise`].
    pub fn denoise(
        &self,
        pipeline: &mut dyn Pipeline,
        request: &Request,
        tell: &mut dyn FnMut(Event),
    ) -> Result<Latents> {
        let set_step = |step: usize, of: usize| {
            if let Some(set) = &self.adapters {
                set.set_step(step, &Steps::new(of));
            }
        };
        set_step(0, request.steps);
        self.times.begin(&self.pager, pipeline, request);
        let mut pace = Pace::new(self.pager.device());
        let latents = pipeline.denoise(request, &mut |event| {
            if let Event::Step { index, of } = event {
                set_step(index, of);
                pace.begins(index, of, tell);
            }
            tell(event);
        })?;
        pace.ends(tell);
        Ok(latents)
    }

    /// From latents to frames, which `each` is given in order. With a [store](OffloadBuilder::store), what
    /// passes cost is then kept in it, if it has no note on that or one that is off by more than 10 %; a note
    /// that cannot be written is logged.
    ///
    /// # Errors
    /// Those of [`Pipeline::decode`], and of `each`.
    pub fn decode(
        &self,
        pipeline: &mut dyn Pipeline,
        request: &Request,
        latents: &Latents,
        tell: &mut dyn FnMut(Event),
        each: &mut dyn FnMut(Picture) -> Result<()>,
    ) -> Result<()> {
        let mut failed = None;
        let decoded = pipeline.decode(request, latents, tell, &mut |frame| {
            each(frame).map_err(|error| {
                failed = Some(error);
                mmgp_models::Error::Input("a frame was not taken".into())
            })
        });
        match (decoded, failed) {
            (Err(_), Some(error)) => return Err(error),
            (decoded, _) => decoded?,
        }
        self.times.keep(&self.pager);
        Ok(())
    }

    /// Changes the limit on all weights; takes effect with the next plan.
    pub fn set_budget(&mut self, budget: Budget) {
        self.budgets.total = budget;
    }

    /// Makes the plan for what was loaded so far, from headers alone. What is loaded later is
    /// planned within the same budgets.
    ///
    /// # Errors
    /// A budget that is too small, with the smallest that works.
    pub fn plan(&self) -> Result<Arc<Plan>> {
        Ok(self.pager.plan(self.budgets.clone())?)
    }

    /// Makes the plan as [`plan`](Self::plan) does, for pictures in the size and with the text length of
    /// `request`: where the [store](OffloadBuilder::store) has a note on what their passes cost on this machine,
    /// with that.
    ///
    /// # Errors
    /// Those of [`plan`](Self::plan).
    pub fn plan_for(&self, pipeline: &dyn Pipeline, request: &Request) -> Result<Arc<Plan>> {
        self.times.begin(&self.pager, pipeline, request);
        self.plan()
    }

    /// What happened so far.
    pub fn report(&self) -> Report {
        self.pager.report()
    }

    /// What a steady pass of the model `name` takes by the plan in force; `None` until its blocks were measured.
    pub fn forecast(&self, name: &str) -> Option<Forecast> {
        self.pager.forecast(name, 1)
    }

    /// Set it to stop at the next block; what runs then fails with an error that
    /// [`is_cancelled`](crate::Error::is_cancelled).
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.pager.cancel_flag()
    }

    /// The pager, for models that are built by hand.
    pub fn pager(&self) -> &Pager {
        &self.pager
    }
}

/// An unmodified candle module whose weights are paged whole.
pub struct Module<M>(Paged<M, ()>);

impl<M> Module<M> {
    /// Runs `f` on the module with its weights on the device. It may be called again when memory
    /// had to be given back, so it must be a pure function of what it captures.
    ///
    /// # Errors
    /// Those of `f`; a file that cannot be read; no room beside models in use.
    pub fn run<R>(&self, f: impl FnMut(&M) -> candle_core::Result<R>) -> Result<R> {
        Ok(self.0.pass()?.stem(f)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_store_keeps_rotated_codes_apart_from_plain_ones() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-flux");
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).with_spare(Bytes(1_000_000));
        let offload = Offload::builder().device(DeviceChoice::Cpu).store(store, |_| ());
        let offload = offload.build().unwrap();
        let file = |activations| {
            let quantize = vec!["transformer".to_string()];
            let options = OpenOptions { quantize, activations, ..OpenOptions::default() };
            let options = offload.stored(&demo, options).unwrap();
            assert_eq!(options.activations, activations);
            options.replaced[0].file.clone()
        };
        // The widths of this model are whole groups in the second layer of feed-forward blocks alone.
        let leaves = |file: &Path| {
            let file = Checkpoint::open(file).unwrap();
            let codes = file.iter().filter(|view| view.name().contains("blocks.0.ff.net."));
            let leaf = |name: &str| name.rsplit('.').next().unwrap().to_string();
            let mut leaves: Vec<_> = codes.map(|view| leaf(view.name())).collect();
            leaves.sort();
            leaves.dedup();
            leaves.into_iter().filter(|leaf| leaf.starts_with('_')).collect::<Vec<_>>()
        };
        let (plain, rotated) = (file(Activations::AsTheyAre), file(Activations::Int8));
        assert_ne!(plain, rotated);
        // The weights of fp8 activations are those of none.
        assert_eq!(file(Activations::Fp8), plain);
        assert_eq!(file(Activations::Int8), rotated);
        assert_eq!(leaves(&plain), ["_data", "_scale"]);
        assert_eq!(leaves(&rotated), ["_data", "_hadamard256", "_scale"]);
    }
}
