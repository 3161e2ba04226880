//! Device state out of a QEMU and into one: QEMU's own migration without the shared RAM, over a pair
//! of connected sockets of which QEMU gets one end. And `cont` after either.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use qapi::qmp::{closefd, getfd, migrate, migrate_incoming};

use super::commands::{MigrationState, QueryMigrate, QueryStatus};
use super::qmp::{Qmp, QmpError, Version};
use super::{failure, refusal};
use crate::guest::{DEVICE_STATE_LIMIT_BYTES, GuestError};

/// How long QEMU may take to hand its device state over: it takes milliseconds.
const SAVE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long QEMU may take to load. Its main thread touches guest RAM meanwhile, which may have to
/// come from the source over a link that is broken for a while.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long the end of a migration may take after its stream has ended.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long QEMU is asked again to let a guest run on.
const AGAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the news may take that the guest runs, when `cont` has been answered.
const RESUME_TIMEOUT: Duration = Duration::from_secs(1);

/// The name under which QEMU keeps its end of the stream.
const STREAM_FD: &str = "farfault-device-state";

/// Room in the socket, so that QEMU writes most device states without waiting for us. It holds its
/// big lock while it writes.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// First version in which a failed load does not end the process if we ask so.
const STAYS_ON_LOAD_ERROR: Version = Version(9, 1, 0);

/// The device state of a stopped guest. Afterwards the guest is still stopped; `cont` lets it go on.
/// Needs [`super::settings::apply`].
pub(super) fn save(qmp: &mut Qmp) -> Result<Vec<u8>, GuestError> {
    let stream = hand_over_stream(qmp)?;
    let command = migrate {
        channels: None,
        detach: None,
        resume: None,
        uri: Some(format!("fd:{STREAM_FD}")),
    };
    // Somebody must read at all times: QEMU answers nothing while it waits for room.
    let (started, read) = thread::scope(|scope| {
        let reader = scope.spawn(move || read_state(stream));
        let started = qmp.execute(&command);
        if started.is_err() {
            // QEMU still holds its end, and the reader waits for the end of the stream.
            give_stream_back(qmp);
        }
        (started, reader.join().expect("the reader does not panic"))
    });
    started?;
    let outcome = settle(qmp)?;
    let state = read?;
    match outcome.status.as_deref() {
        Some("completed") => Ok(state),
        status => Err(failure(format!(
            "QEMU could not save its device state: {}",
            outcome.error_desc.as_deref().or(status).unwrap_or("no reason given"),
        ))),
    }
}

/// Waits until a migration has ended and let go of the virtual machine, so that `cont` works; gives how
/// it ended.
pub(super) fn settle(qmp: &mut Qmp) -> Result<MigrationState, GuestError> {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let migration = qmp.execute(&QueryMigrate {})?;
        if !migration.is_active() && qmp.execute(&QueryStatus {})?.status != "finish-migrate" {
            return Ok(migration);
        }
        if Instant::now() >= deadline {
            return Err(failure(format!(
                "QEMU's migration of its device state has not ended within {} s",
                SETTLE_TIMEOUT.as_secs()
            )));
        }
        thread::sleep(Duration::from_micros(500));
    }
}

/// Reads to the end of the stream, within the limits of size and time. Owns the stream: when it gives
/// up, QEMU's migration fails instead of waiting for a reader.
fn read_state(mut stream: UnixStream) -> Result<Vec<u8>, GuestError> {
    let deadline = Instant::now() + SAVE_TIMEOUT;
    let mut state = Vec::with_capacity(1 << 20);
    let mut chunk = vec![0; 256 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failure(format!(
                "QEMU has not saved its device state within {} s",
                SAVE_TIMEOUT.as_secs()
            )));
        }
        let read = stream.set_read_timeout(Some(left)).and_then(|()| stream.read(&mut chunk));
        match read {
            Ok(0) => return Ok(state),
            Ok(n) if state.len() + n > DEVICE_STATE_LIMIT_BYTES => {
                return Err(refusal(
                    format!(
                        "QEMU's device state is larger than {} MiB",
                        DEVICE_STATE_LIMIT_BYTES >> 20
                    ),
                    "memory of a device travels in it: look at `info ramblock` for what is large",
                ));
            }
            Ok(n) => state.extend_from_slice(&chunk[..n]),
            Err(e) if is_timeout(&e) || e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failure(format!("reading QEMU's device state failed: {e}"))),
        }
    }
}

/// Loads device state into a QEMU that waits with `-incoming defer`. Afterwards the guest is there,
/// stopped, provided that QEMU was started with `-S`. Needs [`super::settings::apply`].
pub(super) fn load(qmp: &mut Qmp, state: &[u8]) -> Result<(), GuestError> {
    let stream = hand_over_stream(qmp)?;
    let command = migrate_incoming {
        channels: None,
        exit_on_error: (qmp.version() >= STAYS_ON_LOAD_ERROR).then_some(false),
        uri: Some(format!("fd:{STREAM_FD}")),
    };
    qmp.forget_events();
    if let Err(error) = qmp.execute(&command) {
        give_stream_back(qmp);
        return Err(error.into());
    }
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut to_qemu = &stream;
            to_qemu.write_all(state)?;
            to_qemu.shutdown(Shutdown::Write)
        });
        let outcome = wait_for_load(qmp);
        // Frees the writer when QEMU has stopped reading.
        let _ = stream.shutdown(Shutdown::Both);
        let written = writer.join().expect("the writer does not panic");
        if let (Err(load), Err(write)) = (&outcome, &written) {
            tracing::debug!("device state not taken in whole: {write}; {load}");
        }
        outcome
    })
}

fn wait_for_load(qmp: &mut Qmp) -> Result<(), GuestError> {
    let ended = qmp.wait_event(LOAD_TIMEOUT, |event| {
        let status = event.data.get("status").and_then(|status| status.as_str());
        match (event.name.as_str(), status) {
            ("MIGRATION", Some("completed")) => Some(true),
            ("MIGRATION", Some("failed")) => Some(false),
            _ => None,
        }
    });
    let reason = match ended {
        Ok(Some(true)) => return Ok(()),
        Ok(Some(false)) | Err(QmpError::Closed { .. }) => {
            let told = qmp.execute(&QueryMigrate {}).ok().and_then(|state| state.error_desc);
            told.unwrap_or_else(|| "it gives the reason on its standard error".to_owned())
        }
        Ok(None) => format!("it has not loaded it within {} s", LOAD_TIMEOUT.as_secs()),
        Err(other) => return Err(other.into()),
    };
    Err(refusal(
        format!("QEMU could not load the device state: {reason}"),
        "start the destination QEMU with the same version, machine and devices as the source",
    ))
}

/// Lets the guest run, and makes sure that it does: QEMU also says yes to `cont` where it only notes
/// the wish.
pub(super) fn cont(qmp: &mut Qmp) -> Result<(), GuestError> {
    qmp.forget_events();
    qmp.execute(&qapi::qmp::cont {})?;
    // It comes before the reply. To ask for the status instead would take another answer of a main
    // thread that may by now wait for pages.
    let resumed = qmp.wait_event(RESUME_TIMEOUT, |event| (event.name == "RESUME").then_some(()))?;
    if resumed.is_some() {
        return Ok(());
    }
    match qmp.execute(&QueryStatus {})?.status.as_str() {
        "running" => Ok(()),
        status => Err(failure(format!("QEMU does not let the guest run: it is {status}"))),
    }
}

/// As [`cont`], again and again for ten seconds: a QEMU at the destination that is just ending may hold a lock on a
/// disk image.
pub(super) fn cont_again(qmp: &mut Qmp) -> Result<(), GuestError> {
    let deadline = Instant::now() + AGAIN_TIMEOUT;
    loop {
        match cont(qmp) {
            Err(error) if Instant::now() < deadline => {
                tracing::debug!(%error, "the guest is asked to run on again");
                thread::sleep(Duration::from_millis(200));
            }
            other => return other,
        }
    }
}

/// Gives QEMU one end of a new stream; ours is returned.
fn hand_over_stream(qmp: &mut Qmp) -> Result<UnixStream, GuestError> {
    let (ours, theirs) =
        UnixStream::pair().map_err(|e| failure(format!("cannot make a socket pair: {e}")))?;
    for end in [&ours, &theirs] {
        // Without the privilege for more, the kernel's default room serves too.
        if setsockopt(&end.as_fd(), sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
            let _ = setsockopt(&end.as_fd(), sockopt::SndBuf, &SOCKET_BUFFER_BYTES);
        }
    }
    qmp.execute_with_fd(&getfd { fdname: STREAM_FD.to_owned() }, theirs.as_fd())?;
    Ok(ours)
}

/// Makes QEMU close its end of a stream that it has not begun to use.
fn give_stream_back(qmp: &mut Qmp) {
    if let Err(error) = qmp.execute(&closefd { fdname: STREAM_FD.to_owned() }) {
        tracing::debug!("QEMU does not close the device state stream: {error}");
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
