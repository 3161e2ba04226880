//! Maps what has come before it is touched.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::{FaultServer, MemoryError, PageIndex, Service, Stage};

/// Maps Current pages in the background, so that the guest need not fault for each of them.
pub struct Mapper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<u64, MemoryError>>>,
}

/// 2 MiB per call: above that the kernel gets no faster, and a fault of the guest may wait for it.
const MAPPER_RUN_PAGES: u64 = 512;

impl Mapper {
    /// Goes once over all pages and maps those that are Current and hold content, in runs of up to
    /// 2 MiB, giving way between them. Pages of zeros stay holes.
    pub fn start(server: &FaultServer) -> Result<Self, MemoryError> {
        let service = server.service();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let name = "page-mapper";
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || {
            map_all(&service, &stopped).inspect_err(
                |error| tracing::warn!(%error, "pages are left to be mapped when they are touched"),
            )
        });
        let thread = thread.map_err(|source| MemoryError::Thread { name, source })?;
        Ok(Mapper { stop, thread: Some(thread) })
    }

    /// Waits until it has gone over all pages; gives how many it mapped.
    pub fn finish(mut self) -> Result<u64, MemoryError> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(0),
        }
    }

    /// True when [`Self::finish`] would not wait.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Mapper {
    /// Stops early.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn map_all(service: &Service, stop: &AtomicBool) -> Result<u64, MemoryError> {
    let pages = service.table.pages();
    let (mut from, mut mapped) = (0, 0);
    while from < pages && !stop.load(Ordering::Relaxed) {
        let window = service.units().stretch(PageIndex(from), MAPPER_RUN_PAGES);
        if service.units().of(window.start).len() > 1 {
            mapped += if service.map_unit_ahead(window)? { window.len() } else { 0 };
            from = window.end.0;
            std::thread::yield_now();
            continue;
        }
        let ready = service.table.next_run(window, |s| s.stage == Stage::Current && !s.zero);
        let Some(run) = ready else {
            from = window.end.0;
            continue;
        };
        mapped += service.map_content(run, None)?;
        from = run.end.0;
        std::thread::yield_now();
    }
    Ok(mapped)
}
