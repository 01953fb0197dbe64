//! Options that say where and within which limits models run, shared by the subcommands that run them.

use std::{path::Path, sync::atomic::Ordering};

use anyhow::Context;
use mmgp::{
    Activations, Budget, Bytes, DeviceChoice, Hardware, Offload, Pipeline, Plan, Profile, Request,
    Settings,
};

use mmgp_quant::Codes;

use super::quantize::{Keep, Quantize};

#[derive(clap::Args)]
pub(crate) struct Machine {
    /// Where to run: auto (a GPU if there is one), cpu, cuda or cuda:N. GPUs need `mmgp-cuda` beside
    /// this command, or a build for CUDA
    #[arg(long, default_value_t)]
    device: DeviceChoice,

    /// Limit on all weights in memory at one moment: 6MB, 25%, min, unlimited or auto
    #[arg(long)]
    budget: Option<String>,

    /// The most VRAM of the whole process, such as 8GB: one card stands for a smaller one
    #[arg(long, value_name = "BYTES", value_parser = super::bytes)]
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

    /// Multiply int8 weights by int8 activations, made row by row: faster on GPUs with int8 tensor cores, with an error
    /// of about 1.2 % in each product of normal values (less exact than int8 weights alone). Acts where weights are
    /// int8, as --quantize makes them, rotated against outliers where a layer has a multiple of 256 inputs; int8 files are
    /// taken as they are; needs a GPU
    #[arg(long)]
    int8_activations: bool,

    /// Multiply fp8 weights by fp8 activations, made row by row: faster on GPUs of compute capability 9.0 (H100, H200), with an
    /// error of about 3.7 % in each product of normal values; on others they are expanded as ever. Acts where weights
    /// are fp8, as --quantize fp8 makes them; needs a GPU
    #[arg(long, conflicts_with = "int8_activations")]
    fp8_activations: bool,

    #[command(flatten)]
    keep: Keep,

    /// 0: as --quiet; 2: print every setting, where it comes from, and whether it acts on this machine
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=2))]
    verbose: u8,

    /// Print neither plan nor progress nor report
    #[arg(long, short)]
    quiet: bool,
}

fn rate(text: &str) -> Result<Bytes, String> {
    super::bytes(text.strip_suffix("/s").unwrap_or(text))
        .map_err(|_| "expected an amount a second such as 12GB/s".into())
}

impl Machine {
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet || self.verbose == 0
    }

    /// Becomes the build for CUDA where that is meant and there is one.
    #[cfg(not(feature = "cuda"))]
    pub(crate) fn hand_over(&self) -> anyhow::Result<()> {
        crate::sibling::hand_over(self.device, |why| {
            if !self.is_quiet() {
                eprintln!("{why}");
            }
        })
    }

    #[cfg(feature = "cuda")]
    #[allow(clippy::unnecessary_wraps, reason = "the other build's does")]
    pub(crate) fn hand_over(&self) -> anyhow::Result<()> {
        Ok(())
    }

    /// A pager on the device, with what the options say, and the pipeline in `dir` over it.
    pub(crate) fn open(&self, dir: &Path) -> anyhow::Result<(Offload, Box<dyn Pipeline>)> {
        let settings = self.settings()?;
        if self.verbose >= 2 {
            eprintln!("{}", settings.explain(&Hardware::detect()));
        }
        let mut builder = Offload::builder().device(self.device).settings(settings);
        builder = builder.activations(self.activations());
        if let Some(limit) = self.vram_limit {
            builder = builder.vram_limit(limit);
        }
        if let Some(limit) = self.link_limit {
            builder = builder.link_limit(limit);
        }
        if let Some(store) = self.keep.store() {
            builder = builder.store(store, |line| eprintln!("{line}"));
        }
        if let Ok(program) = std::env::current_exe() {
            builder = builder.kernel_compiler(program);
        }
        let mut offload = builder.build()?;
        let pipeline = offload.pipeline(dir)?;
        if let Some(codes) = self.activations().codes() {
            let form = match codes {
                Codes::Int8 | Codes::RotatedInt8 => "u8",
                Codes::Fp8 => "fp8",
            };
            let has = |of: &str| of.split('+').any(|dtype| dtype == form);
            if !offload.report().models.iter().any(|m| has(&m.form)) {
                eprintln!(
                    "warning: --{codes}-activations does nothing here: no weights are {codes}; --quantize {codes} \
                     makes the transformer's so"
                );
            }
        }
        Ok((offload, pipeline))
    }

    /// What products take of their input.
    fn activations(&self) -> Activations {
        match (self.int8_activations, self.fp8_activations) {
            (true, _) => Activations::Int8,
            (_, true) => Activations::Fp8,
            _ => Activations::AsTheyAre,
        }
    }

    /// The plan for `request`, within the options' budget or the pipeline's own.
    pub(crate) fn plan(
        &self,
        offload: &mut Offload,
        pipeline: &dyn Pipeline,
        request: &Request,
    ) -> anyhow::Result<std::sync::Arc<Plan>> {
        let budget = self.budget.as_ref().or(pipeline.defaults().budget.as_ref());
        if let Some(budget) = budget {
            offload.set_budget(budget.parse::<Budget>().map_err(mmgp::Error::from)?);
        }
        match offload.plan_for(pipeline, request) {
            // The pipeline's own default was made for its weights as they are stored.
            Err(mmgp::Error::Residency(mmgp_residency::Error::BudgetTooSmall {
                minimum, ..
            })) if self.budget.is_none() => {
                eprintln!("note: the pipeline's default budget is too small here; using {minimum}");
                offload.set_budget(Budget::Min);
                Ok(offload.plan_for(pipeline, request)?)
            }
            plan => Ok(plan?),
        }
    }

    /// The profile's settings, or the defaults, with what the options override.
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut settings = self.profile.map_or_else(Settings::default, Profile::settings);
        if let Some(budgets) = &self.budgets {
            settings.set("budgets", budgets).map_err(mmgp::Error::from).context("--budgets")?;
        }
        self.quantize.apply(&mut settings)?;
        Ok(settings)
    }
}

/// The first Ctrl-C stops at the next block, the second at once.
pub(crate) fn stop_on_signal(offload: &Offload) -> anyhow::Result<()> {
    let cancel = offload.cancel_flag();
    ctrlc::set_handler(move || {
        if cancel.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this block; again to stop at once");
    })
    .context("cannot listen for Ctrl-C")
}
