//! A QEMU that an earlier farfault has left, found again by what that wrote down.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qapi::qmp::{migrate_cancel, stop};

use super::announce::announcement;
use super::commands::{QueryMigrate, QueryStatus};
use super::qmp::Qmp;
use super::settings::SavedSettings;
use super::spawn::{SOCKET_NAME, remove_ram_files};
use super::{device_state, failure, process, refusal};
use crate::guest::{GuestError, Whereabouts};

/// How long a killed QEMU may take to end: its memory has to be given back.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long QEMU may take to end after `quit`: it flushes disk images.
const QUIT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a cancelled migration may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the guest runs; `None` for a QEMU that has ended.
///
/// # Errors
/// When QEMU is there and does not answer.
pub fn is_running(place: &Whereabouts) -> Result<Option<bool>, GuestError> {
    if !place.process.is_some_and(|process| process.lives()) {
        return Ok(None);
    }
    Ok(Some(connect(place)?.execute(&QueryStatus {})?.status == "running"))
}

/// How a guest stands whose device state was taken so that it could move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its QEMU has ended.
    Gone,
    /// As it was left: its memory is what it was then.
    Still,
    /// Somebody has let it run, and may have stopped it again.
    Disturbed,
}

/// Whether a guest that moves still stands. One that was let run is stopped.
///
/// # Errors
/// When its QEMU is there and does not answer.
pub fn still_stands(place: &Whereabouts) -> Result<Standing, GuestError> {
    if !place.process.is_some_and(|process| process.lives()) {
        return Ok(Standing::Gone);
    }
    let still = keep_still(&mut connect(place)?)?;
    Ok(if still { Standing::Still } else { Standing::Disturbed })
}

/// What QEMU calls a guest whose device state was loaded, until somebody lets it run.
const ARRIVED: [&str; 2] = ["paused", "prelaunch"];

/// What QEMU calls a guest whose device state was taken, until somebody lets it run.
const LEFT_STATUS: &str = "postmigrate";

/// True when the guest stands as it was left; one that does not is stopped.
pub(super) fn keep_still(qmp: &mut Qmp) -> Result<bool, GuestError> {
    let status = qmp.execute(&QueryStatus {})?.status;
    if status == "running" {
        qmp.execute(&stop {})?;
    }
    Ok(status == LEFT_STATUS)
}

/// Lets the guest run, unless its owner had paused it; puts QEMU's migration settings back.
/// Harmless when it runs.
///
/// # Errors
/// When that QEMU has ended or another answers at its socket; QEMU's own.
pub fn let_run(place: &Whereabouts) -> Result<(), GuestError> {
    let mut qmp = connect(place)?;
    start(place, &mut qmp, device_state::cont_again)?;
    put_back(place, &mut qmp);
    Ok(())
}

/// As [`let_run`], for a guest that has come here: whoever was to tell its network may have been killed before.
///
/// # Errors
/// As of [`let_run`].
pub(super) fn let_run_arrived(place: &Whereabouts) -> Result<(), GuestError> {
    let mut qmp = connect(place)?;
    let status = qmp.execute(&QueryStatus {})?.status;
    if ARRIVED.contains(&status.as_str()) {
        start(place, &mut qmp, device_state::cont)?;
    } else if status != "running" {
        tracing::warn!(
            "the guest has run here, and is in the state {status} by now: it is left so"
        );
    }
    if place.runs
        && let Err(error) = qmp.execute(&announcement())
    {
        tracing::warn!("the guest runs, but its network is not told where: {error}");
    }
    put_back(place, &mut qmp);
    Ok(())
}

fn start(
    place: &Whereabouts,
    qmp: &mut Qmp,
    cont: fn(&mut Qmp) -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    if qmp.execute(&QueryStatus {})?.status != "running" {
        let deadline = Instant::now() + CANCEL_TIMEOUT;
        while qmp.execute(&QueryMigrate {})?.is_active() {
            if Instant::now() >= deadline {
                return Err(failure("QEMU's own migration cannot be cancelled"));
            }
            qmp.execute(&migrate_cancel {})?;
            thread::sleep(Duration::from_millis(5));
        }
        device_state::settle(qmp)?;
        if place.runs {
            cont(qmp)?;
        }
    }
    Ok(())
}

/// Puts the migration settings back, as far as QEMU listens: a guest that has moved does not hang on it.
pub(super) fn restore_settings(place: &Whereabouts) {
    match connect(place) {
        Ok(mut qmp) => put_back(place, &mut qmp),
        Err(error) => tracing::warn!("QEMU's migration settings are not put back: {error}"),
    }
}

/// Asks the QEMU of a guest that has moved away to end.
pub(super) fn quit(place: &Whereabouts) -> Result<(), GuestError> {
    let mut qmp = connect(place)?;
    qmp.tell(&qapi::qmp::quit {})?;
    if qmp.wait_closed(QUIT_TIMEOUT)? { Ok(()) } else { Err(failure("QEMU does not end")) }
}

/// Ends a QEMU that farfault had started, and removes the RAM files that it had made and the directory
/// of its socket. Works while its threads wait for pages. Harmless when it has ended.
///
/// # Errors
/// When it does not end.
pub fn end(place: &Whereabouts) -> Result<(), GuestError> {
    let Some(process) = place.process.filter(|_| place.started_here) else { return Ok(()) };
    let deadline = Instant::now() + KILL_TIMEOUT;
    while process.is_seen_to_live()? {
        // Its number is its own as long as it lives.
        let _ = kill(Pid::from_raw(process.pid.cast_signed()), Signal::SIGKILL);
        if Instant::now() >= deadline {
            return Err(failure(format!("QEMU (process {}) does not end", process.pid)));
        }
        thread::sleep(Duration::from_millis(5));
    }
    remove_ram_files(&place.ram_files);
    remove_private_socket(place);
    Ok(())
}

/// The directory that farfault had made for the QMP socket of a QEMU that it started.
pub(super) fn remove_private_socket(place: &Whereabouts) {
    let directory = place.qmp.as_deref().and_then(Path::parent).filter(|_| place.started_here);
    if let Some(directory) = directory {
        let _ = std::fs::remove_file(directory.join(SOCKET_NAME));
        let _ = std::fs::remove_dir(directory);
    }
}

fn put_back(place: &Whereabouts, qmp: &mut Qmp) {
    if let Ok(settings) = serde_json::from_value::<SavedSettings>(place.settings.clone()) {
        settings.restore(qmp);
    }
}

/// The QEMU of that time, and no other that answers at its socket now.
fn connect(place: &Whereabouts) -> Result<Qmp, GuestError> {
    let (Some(path), Some(process)) = (&place.qmp, place.process) else {
        return Err(failure(format!(
            "a guest of {} lives in the farfault process that held it, and has ended with it",
            place.monitor
        )));
    };
    if !process.lives() {
        return Err(failure(format!("the guest's QEMU (process {}) has ended", process.pid)));
    }
    let mut qmp = Qmp::connect(path)?;
    let found = process::find(&mut qmp)?;
    if found.pid == process.pid {
        return Ok(qmp);
    }
    Err(refusal(
        format!("at {} answers process {}, not QEMU {}", path.display(), found.pid, process.pid),
        "continue the guest through another monitor of its QEMU, or end that QEMU",
    ))
}
