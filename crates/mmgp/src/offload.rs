//! The facade: a device, budgets, and models under names.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use mmgp_io::Checkpoint;
use mmgp_models::{Pipeline, open_pipeline};
use mmgp_residency::{Budget, Budgets, ModelBuilder, Paged, Pager, Plan, Report, check_pageable};

use crate::Result;

/// Models that share one device and its budgets.
pub struct Offload {
    pager: Pager,
    budgets: Budgets,
}

/// Collects what an [`Offload`] needs.
pub struct OffloadBuilder {
    device: Device,
    budgets: Budgets,
}

impl OffloadBuilder {
    /// The device to run on; the CPU by default.
    #[must_use]
    pub fn device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// The limit on all weights on the device at one moment; [`Budget::Auto`] by default.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budgets.total = budget;
        self
    }

    /// A cap of one model beside the budget of all.
    #[must_use]
    pub fn model_budget(mut self, model: &str, budget: Budget) -> Self {
        self.budgets.models.push((model.to_string(), budget));
        self
    }

    /// Starts the pager. Nothing is read.
    ///
    /// # Errors
    /// A device that this build cannot page on.
    pub fn build(self) -> Result<Offload> {
        Ok(Offload { pager: Pager::new(&self.device)?, budgets: self.budgets })
    }
}

impl Offload {
    /// Starts with the CPU and [`Budget::Auto`].
    pub fn builder() -> OffloadBuilder {
        OffloadBuilder { device: Device::Cpu, budgets: Budget::Auto.into() }
    }

    /// Opens a pipeline's folder. Reads configs, tokenizers and headers, no weights.
    ///
    /// # Errors
    /// Anything in the folder that is missing, malformed or of an unknown class.
    pub fn pipeline(&self, dir: impl AsRef<Path>) -> Result<Box<dyn Pipeline>> {
        Ok(open_pipeline(dir.as_ref(), &self.pager)?)
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

    /// What happened so far.
    pub fn report(&self) -> Report {
        self.pager.report()
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
