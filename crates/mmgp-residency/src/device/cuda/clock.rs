//! When computing waited for a block and how long the block took, read from events on the computing
//! stream without waiting for them.

use std::{sync::Arc, time::Duration};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, sys};

use super::failed;
use crate::{
    Result,
    device::{Clock, VisitTimes},
};

pub(super) struct EventClock {
    stream: Arc<CudaStream>,
    asked: CudaEvent,
    began: CudaEvent,
    ended: CudaEvent,
    /// Whether it was asked for the block before it began.
    waited: bool,
    /// Whether a whole visit was recorded and not read.
    whole: bool,
}

impl EventClock {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let event = || timed(stream);
        let (asked, began, ended) = (event()?, event()?, event()?);
        Ok(Self { stream: stream.clone(), asked, began, ended, waited: false, whole: false })
    }

    fn record(&mut self, which: fn(&Self) -> &CudaEvent) {
        if let Err(error) = which(self).record(&self.stream) {
            tracing::debug!("a block was not timed: {error}");
        }
    }
}

impl Clock for EventClock {
    fn asked(&mut self) {
        self.waited = true;
        self.record(|clock| &clock.asked);
    }

    fn began(&mut self) {
        self.whole = false;
        self.record(|clock| &clock.began);
    }

    fn ended(&mut self) {
        self.record(|clock| &clock.ended);
        self.whole = true;
    }

    fn read(&mut self) -> Result<Option<VisitTimes>> {
        let over = self.ended.try_is_complete().map_err(|e| failed("an event", e))?;
        if !self.whole || !over {
            return Ok(None);
        }
        self.whole = false;
        let stalled = match std::mem::take(&mut self.waited) {
            true => between(&self.asked, &self.began)?,
            false => Duration::ZERO,
        };
        Ok(Some(VisitTimes { stalled, computed: between(&self.began, &self.ended)? }))
    }
}

/// An event that keeps the time.
pub(super) fn timed(stream: &Arc<CudaStream>) -> Result<CudaEvent> {
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    stream.context().new_event(flags).map_err(|e| failed("an event", e))
}

/// The time between two events that have passed.
pub(super) fn between(first: &CudaEvent, second: &CudaEvent) -> Result<Duration> {
    let ms = first.elapsed_ms(second).map_err(|e| failed("an event", e))?;
    Ok(Duration::from_secs_f64(f64::from(ms.max(0.)) * 1e-3))
}
