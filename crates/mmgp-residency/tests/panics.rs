//! A fetch that panics is an error of the lease that needs it.
#![allow(clippy::unwrap_used)]

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use candle_core::{DType, Tensor};
use mmgp_residency::{
    BlockImage, Budget, Bytes, Clock, Device, Digest, Host, ImageTensor, Moved, Occupancy, Pager,
    Result, Slot,
};

mod common;
use common::{build, run, write};

/// The host, with slots that panic once when they are told to.
struct Panicky {
    host: Host,
    panics: Arc<AtomicBool>,
}

struct PanickySlot(Box<dyn Slot>, Arc<AtomicBool>);

impl Device for Panicky {
    fn candle(&self) -> &candle_core::Device {
        self.host.candle()
    }

    fn compute_dtype(&self) -> DType {
        self.host.compute_dtype()
    }

    fn available(&self) -> Result<Bytes> {
        self.host.available()
    }

    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>> {
        let slot = self.host.slot(capacity, occupancy)?;
        Ok(Box::new(PanickySlot(slot, self.panics.clone())))
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        self.host.clock()
    }
}

impl Slot for PanickySlot {
    fn fill(&mut self, image: &BlockImage) -> Result<u64> {
        assert!(!self.1.swap(false, Ordering::Relaxed), "as it was told");
        self.0.fill(image)
    }

    fn moved(&mut self) -> Option<Moved> {
        self.0.moved()
    }

    fn digest(&self, tensors: &[ImageTensor]) -> Result<Digest> {
        self.0.digest(tensors)
    }

    fn bind(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.0.bind(tensors)
    }

    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.0.unbind(tensors)
    }
}

#[test]
fn a_fetch_that_panics_is_an_error_and_no_lease_waits_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, 3, 5);
    let panics = Arc::new(AtomicBool::new(true));
    let device = Panicky { host: Host::new().unwrap(), panics: panics.clone() };
    let pager = Pager::over(device).unwrap();
    let tower = build(&pager, "tower", &path, 3);
    pager.plan(Budget::Min).unwrap();
    let error = run(&tower).unwrap_err().to_string();
    assert!(error.contains("panicked"), "{error}");
    let expected = run(&tower).unwrap();
    // Fetched ahead, it is tried again when it is needed.
    panics.store(true, Ordering::Relaxed);
    assert_eq!(run(&tower).unwrap(), expected);
}
