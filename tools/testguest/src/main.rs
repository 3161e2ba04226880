//! The guest that the migration tests move: an init that fills memory, writes to it in a pattern,
//! and checks every page of it again and again.
//!
//! It runs as PID 1 on a distribution's kernel, takes its parameters from the kernel's command
//! line ([`params`]) and speaks on QEMU's debug port 0xe9 ([`console`]), which needs no interrupt
//! and no driver, so it works from the first to the last moment of a migration. Each line is one
//! of:
//!
//! * `ready WORKING_SET_PAGES`: memory is filled, the work begins.
//! * `hb MS OPS SWEEPS ERRORS`: a heartbeat, every `ff.hb` milliseconds: the guest's monotonic clock,
//!   page operations of the pattern so far, complete verifications of all pages, errors found.
//! * `slow US`: an operation or verification of one page took so many microseconds, 500 or more: the page
//!   was waited for, or the guest was not run.
//! * `sweep N pages M ok` or `sweep N pages M errors E`: one more verification is complete.
//! * `CORRUPT page I: ...`: a page is not what the guest wrote last (the first hundred of them).
//!   With `ff.pattern=redis` these lines speak of the keys of a redis server ([`redis`]) instead of pages.
//! * `io net S R blk B rng G errors E`: with `ff.io=1`, each 100 ms: pings sent and answered,
//!   blocks written and read back, random bytes, failures.
//! * `job ...`: with `ff.job`, what that program says ([`job`]).
//! * `fatal ...`: the guest cannot go on.
//!
//! With `ff.pattern=stream` it also sends frames to a client outside, by UDP ([`stream`]).
//!
//! It obeys single bytes on the first serial port: `v` makes it verify from the first page on, as fast as it can, which it
//! begins by saying `verifying`; `n` makes it go on at the rate of its parameters.
//!
//! One thread does the writing, the verification and the heartbeats. So a gap between heartbeats
//! is a time in which the guest, which has one processor, did not get on.

mod boot;
mod console;
mod device_io;
mod interface;
mod job;
mod memory;
mod params;
mod random;
mod redis;
mod resp;
mod stream;
mod work;

use std::process::ExitCode;

use console::say;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("this is the init of a test guest: build its image with tools/build-guest");
        return ExitCode::FAILURE;
    }
    if let Err(error) = run() {
        say!("fatal {error}");
    }
    // An init that ends is a kernel panic, which hides what was said.
    loop {
        std::thread::park();
    }
}

fn run() -> Result<(), String> {
    console::open()?;
    boot::mount_kernel_filesystems()?;
    let command_line = std::fs::read_to_string("/proc/cmdline").map_err(|e| e.to_string())?;
    let params = params::Params::parse(&command_line)?;
    boot::load_modules(&command_line)?;
    let activity = if params.io { Some(device_io::start(&params)?) } else { None };
    if let Some(name) = &params.job {
        job::start(name)?;
    }
    if params.pattern == work::Pattern::Redis {
        let redis = redis::RedisWork::start(&params)?;
        say!("ready {}", redis.keys());
        return work::run(&params, redis, activity.as_deref());
    }
    let set = memory::WorkingSet::filled(params.pages(), params.fill, params.seed)?;
    let pages = work::PageWork::new(&params, set);
    if params.pattern == work::Pattern::Stream {
        let stream = stream::StreamWork::start(&params, pages)?;
        say!("ready {}", params.pages());
        return work::run(&params, stream, activity.as_deref());
    }
    say!("ready {}", params.pages());
    work::run(&params, pages, activity.as_deref())
}
