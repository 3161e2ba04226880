//! The threads: started with their workers, stopped between two operations, their workers taken back.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::guest::GuestError;
use crate::guest::workload::{Gauge, Pacer, Task, Worker, Workload};
use crate::memory::GuestMapping;
use crate::page::PageIndex;

/// A thread that has not stopped after this long waits for a page that does not come.
const STOP_LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Crew {
    ram: Arc<GuestMapping>,
    workload: Workload,
    gauges: Vec<Arc<Gauge>>,
    posts: Posts,
}

/// Where the workers are.
enum Posts {
    AtRest(Vec<Worker>),
    AtWork { stop: Arc<AtomicBool>, threads: Vec<Post> },
}

struct Post {
    thread: JoinHandle<()>,
    finished: Receiver<Worker>,
    /// Back from its thread, while others are still out.
    back: Option<Worker>,
}

impl Crew {
    /// Workers at rest.
    pub(super) fn new(ram: Arc<GuestMapping>, workload: Workload, workers: Vec<Worker>) -> Crew {
        let gauge = |worker: &Worker| {
            let gauge = Gauge::of(worker.pages());
            gauge.report(worker.status());
            gauge
        };
        let gauges = workers.iter().map(gauge).collect();
        Crew { ram, workload, gauges, posts: Posts::AtRest(workers) }
    }

    pub(super) fn gauges(&self) -> &[Arc<Gauge>] {
        &self.gauges
    }

    /// The workload and its workers, while they are stopped.
    pub(super) fn at_rest(&self) -> Result<(Workload, &[Worker]), GuestError> {
        match &self.posts {
            Posts::AtRest(workers) => Ok((self.workload, workers)),
            Posts::AtWork { .. } => Err(GuestError::new("the guest's threads are running")),
        }
    }

    /// Starts a thread for each worker. Harmless when they run. Those of which one was asked to stop and had not stopped
    /// in time have to stop first.
    pub(super) fn start(&mut self) -> Result<(), GuestError> {
        if let Posts::AtWork { stop, .. } = &self.posts
            && stop.load(SeqCst)
        {
            self.stop()?;
        }
        let Posts::AtRest(workers) = &self.posts else { return Ok(()) };
        let Some(count) = u32::try_from(workers.len()).ok().and_then(NonZeroU32::new) else {
            return Err(GuestError::new("the guest has no workers"));
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (mut threads, mut starts) = (Vec::new(), Vec::new());
        for (id, (worker, gauge)) in workers.iter().zip(&self.gauges).enumerate() {
            let (sender, finished) = channel();
            let (start, started) = channel();
            let (mut worker, ram, stop) = (worker.clone(), self.ram.clone(), stop.clone());
            let (workload, gauge) = (self.workload, gauge.clone());
            let work = move || {
                // None begins before all can: after a failure the workers are still where they were.
                if started.recv().is_err() {
                    return;
                }
                let mut pacer = Pacer::new(workload, count, gauge.clone());
                work(&mut worker, &mut pacer, &gauge, &ram, &stop);
                // Nobody waits for it when the guest has been given up.
                let _ = sender.send(worker);
            };
            let thread = thread::Builder::new()
                .name(format!("worker-{id}"))
                .spawn(work)
                .map_err(|error| GuestError::new(format!("start a guest thread: {error}")))?;
            threads.push(Post { thread, finished, back: None });
            starts.push(start);
        }
        for start in starts {
            start.send(()).expect("it waits for this");
        }
        self.posts = Posts::AtWork { stop, threads };
        Ok(())
    }

    /// Stops all threads between two operations. Harmless when they are stopped.
    pub(super) fn stop(&mut self) -> Result<(), GuestError> {
        let Posts::AtWork { stop, threads } = &mut self.posts else { return Ok(()) };
        stop.store(true, SeqCst);
        threads.iter().for_each(|post| post.thread.thread().unpark());
        let deadline = Instant::now() + STOP_LIMIT;
        for post in threads.iter_mut().filter(|post| post.back.is_none()) {
            let left = deadline.saturating_duration_since(Instant::now());
            post.back = Some(post.finished.recv_timeout(left).map_err(|_| {
                GuestError::new(format!(
                    "a guest thread has not stopped within {STOP_LIMIT:?}: it waits for a page that does \
                     not come"
                ))
            })?);
        }
        let workers = threads.iter_mut().filter_map(|post| post.back.take()).collect();
        self.posts = Posts::AtRest(workers);
        Ok(())
    }
}

#[cfg(test)]
impl Crew {
    /// As a stop leaves it that was not done in time.
    pub(super) fn ask_to_stop(&self) {
        let Posts::AtWork { stop, .. } = &self.posts else { return };
        stop.store(true, SeqCst);
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        // A thread that still waits for a page is left behind; it keeps alive all that it uses.
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "dropping a guest");
        }
    }
}

fn work(
    worker: &mut Worker,
    pacer: &mut Pacer,
    gauge: &Gauge,
    ram: &GuestMapping,
    stop: &AtomicBool,
) {
    let page = |number| ram.page(PageIndex(number));
    while let Some(task) = pacer.next(stop) {
        let (Task::Work(steps) | Task::Verify(steps)) = task;
        for _ in 0..steps {
            if stop.load(SeqCst) {
                break;
            }
            match task {
                Task::Work(_) => worker.operate(page),
                Task::Verify(_) => worker.verify_next(page),
            }
        }
        gauge.report(worker.status());
    }
}
