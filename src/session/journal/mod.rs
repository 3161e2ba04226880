//! What a side must not forget: a directory for each side of each migration, below the state directory.
//!
//! ```text
//! <state-dir>/56d9415255b0337c.source/    mode 0700, all files 0600
//!     about       who works on it, and on which guest: one JSON object
//!     journal     what was decided: a JSON object a line, on disk before the migration goes on
//!     takeover    what another process needs to go on with it, and it alone: it holds secrets
//!     control     a socket, while a farfault works on it (`session::control`)
//! ```
//!
//! Whoever works on a migration holds a lock on its journal, which goes with the process. The directory is
//! removed when its migration has ended for sure; one that is found later tells where the guest may run.
//! All of it can be read with any pager.

mod about;
mod records;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::engine::Failure;
use crate::memory::adopt::ProcessIdentity;

pub use about::{About, Side};
pub use records::{Entry, Record, Records};

/// The file of records.
const JOURNAL: &str = "journal";
/// The file that says whose it is.
const ABOUT: &str = "about";
/// The file for a process that takes over.
const TAKEOVER: &str = "takeover";
/// The socket of the one who works on it.
pub(super) const SOCKET: &str = "control";
/// Where the destination's page table is: in memory, since each page that comes is noted there.
const PAGES_DIRECTORY: &str = "/dev/shm";
/// Most migrations that a state directory is searched for.
const MAX_MIGRATIONS: usize = 10_000;

/// The journal of one side of one migration, held by who works on it.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    directory: PathBuf,
    sound: bool,
}

#[derive(Serialize)]
struct Line<'a, R> {
    unix_ms: u64,
    record: &'a R,
}

/// Where journals are kept unless the operator says otherwise: `/var/lib/farfault` for root, else
/// below the user's state directory.
pub fn default_state_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/var/lib/farfault");
    }
    let base = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
    base.unwrap_or_else(std::env::temp_dir).join("farfault")
}

/// What is left of one side of a migration, or is under way.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its directory.
    pub directory: PathBuf,
    /// Whose it is.
    pub about: About,
    /// What was written down.
    pub records: Records,
}

impl Found {
    /// True while the farfault that works on it lives.
    pub fn is_owned(&self) -> bool {
        self.about.owner.lives()
    }

    /// What was kept by [`Journal::keep`].
    ///
    /// # Errors
    /// When nothing was, or it cannot be read.
    pub fn kept<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        about::read_json(&self.directory.join(TAKEOVER))
    }

    /// `MIGRATION.SIDE`, which names it on this host.
    pub fn name(&self) -> String {
        self.about.name()
    }
}

/// All sides of migrations in `state_dir`, oldest first, and what could not be read. A directory that
/// does not exist holds none.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(state_dir: &Path) -> Result<(Vec<Found>, Vec<Failure>), Failure> {
    let entries = match fs::read_dir(state_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((vec![], vec![])),
        Err(error) => {
            let text =
                format!("the state directory {} cannot be read: {error}", state_dir.display());
            return Err(Failure::new(text, "run as root, or name another one with --state-dir"));
        }
    };
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    for entry in entries.flatten().take(MAX_MIGRATIONS) {
        let name = entry.file_name();
        if Side::of_name(&name.to_string_lossy()).is_none() {
            sweep(&entry);
            continue;
        }
        match open_found(&entry.path()) {
            Ok(one) => found.push(one),
            // It was removed meanwhile.
            Err(_) if !entry.path().exists() => {}
            Err(failure) => failures.push(failure),
        }
    }
    found.sort_by_key(|one| (one.about.begun_unix_ms, one.name()));
    Ok((found, failures))
}

/// Removes what somebody was killed over while he made or removed it.
fn sweep(entry: &fs::DirEntry) {
    let is_unfinished = entry.file_name().to_string_lossy().ends_with(UNFINISHED);
    let touched = entry.metadata().and_then(|about| about.modified()).ok();
    let age = touched.and_then(|touched| touched.elapsed().ok());
    if is_unfinished && age.is_some_and(|age| age > UNFINISHED_FOR) {
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// A shorter beginning names nothing: a script whose variable is empty must not get the only migration there is.
const MIN_ID_CHARACTERS: usize = 4;

/// The one that `id` names: a migration's id, at least four characters of its beginning, or with `.source` or
/// `.destination` behind it where both are on this host.
///
/// # Errors
/// When there is none, or more than one, or the beginning is too short.
pub fn find(state_dir: &Path, id: &str, side: Option<Side>) -> Result<Found, Failure> {
    if id.chars().count() < MIN_ID_CHARACTERS {
        return Err(Failure::new(
            format!(
                "{id:?} names no migration: at least {MIN_ID_CHARACTERS} characters of its ID are needed"
            ),
            "`farfault status` lists them",
        ));
    }
    let (mut all, failures) = list(state_dir)?;
    all.retain(|one| one.name().starts_with(id) && side.is_none_or(|side| one.about.side == side));
    if all.len() > 1 {
        let names: Vec<String> = all.iter().map(Found::name).collect();
        let text = format!("{id} may be {}", names.join(" or "));
        return Err(Failure::new(text, "give the whole name"));
    }
    if let Some(one) = all.pop() {
        return Ok(one);
    }
    // One that is there and cannot be read says why.
    if let Some(failure) = failures.into_iter().find(|failure| failure.reason.contains(id)) {
        return Err(failure);
    }
    Err(Failure::new(
        format!("no migration {id} is in {}", state_dir.display()),
        "`farfault status` lists them; name the directory with --state-dir if it is another",
    ))
}

fn open_found(directory: &Path) -> Result<Found, Failure> {
    let about = about::read_json(&directory.join(ABOUT))?;
    let records = Records::read(&directory.join(JOURNAL))?;
    Ok(Found { directory: directory.to_owned(), about, records })
}

impl Journal {
    /// A new journal in a directory of its own, which only its owner can enter, held by this process.
    ///
    /// # Errors
    /// When the directory exists or cannot be made.
    pub fn create(state_dir: &Path, about: &About) -> Result<Self, Failure> {
        let directory = state_dir.join(about.name());
        // Who is killed half way leaves nothing that looks like a migration.
        let new = beside(&directory, UNFINISHED);
        let make = || {
            DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
            if directory.exists() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            DirBuilder::new().mode(0o700).create(&new)?;
            let file = OpenOptions::new()
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(new.join(JOURNAL))?;
            about::write_json(&new.join(ABOUT), about, true)?;
            let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
            // The names must be on disk too.
            File::open(&new)?.sync_all()?;
            fs::rename(&new, &directory)?;
            File::open(state_dir)?.sync_all()?;
            Ok(file)
        };
        let file = make().map_err(|error: io::Error| {
            let _ = fs::remove_dir_all(&new);
            Failure::new(
                format!("the journal {} cannot be made: {error}", directory.display()),
                "name a directory that can be written with --state-dir",
            )
        })?;
        Ok(Journal { file, directory, sound: true })
    }

    /// Takes over the journal of a farfault that has ended, to add to it.
    ///
    /// # Errors
    /// When somebody works on that migration.
    pub fn take_over(found: &Found) -> Result<Self, Failure> {
        let busy = || {
            let pid = found.about.owner.pid;
            Failure::new(
                format!("farfault (process {pid}) works on migration {}", found.name()),
                "wait until it has ended, end it with `farfault cancel`, or kill it",
            )
        };
        if found.is_owned() {
            return Err(busy());
        }
        let path = found.directory.join(JOURNAL);
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| {
            Failure::plain(format!("the journal {} cannot be opened: {error}", path.display()))
        })?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| busy())?;
        // Another heir may have come in between.
        let records = Records::read(&path)?;
        if records != found.records {
            return Err(Failure::plain(format!(
                "migration {} has changed: look again",
                found.name()
            )));
        }
        file.set_len(records.len_bytes).map_err(|error| {
            Failure::plain(format!("the journal {} failed: {error}", path.display()))
        })?;
        Ok(Journal { file, directory: found.directory.clone(), sound: true })
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// What cannot be written whole is taken back. Where even that fails, nothing is known of the record
    /// ([`Self::is_sound`]), and none is written after it.
    pub fn record<R: Serialize>(&mut self, record: &R) -> Result<(), Failure> {
        let path = self.path();
        let failed =
            |error| Failure::plain(format!("the journal {} failed: {error}", path.display()));
        if !self.sound {
            return Err(failed(io::Error::other("an earlier record could not be taken back")));
        }
        let before = self.file.metadata().map_err(failed)?.len();
        let unix_ms = unix_ms();
        let mut line = serde_json::to_vec(&Line { unix_ms, record }).expect("plain data");
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            let failure = failed(error);
            let taken_back = self.file.set_len(before).and_then(|()| self.file.sync_data());
            self.sound = taken_back.is_ok();
            return Err(failure);
        }
        Ok(())
    }

    /// False when a record could be neither written nor taken back.
    pub fn is_sound(&self) -> bool {
        self.sound
    }

    /// From here on this process is the owner.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn own(&self, about: &About) -> Result<(), Failure> {
        let about = About { owner: ProcessIdentity::own()?, ..about.clone() };
        let path = self.directory.join(ABOUT);
        about::write_json(&path, &about, true).map_err(|error| {
            Failure::plain(format!("{} cannot be written: {error}", path.display()))
        })
    }

    /// Keeps what another process needs to take over, in the place of what was kept before. It outlives
    /// this process, not the host.
    pub fn keep<T: Serialize>(&self, value: &T) {
        let path = self.directory.join(TAKEOVER);
        if let Err(error) = about::write_json(&path, value, false) {
            tracing::warn!("{}: {error}: no process could take over", path.display());
        }
    }

    /// Where the destination's page table is kept.
    pub fn pages_path(&self) -> PathBuf {
        pages_path(&self.directory)
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.directory.join(JOURNAL)
    }

    /// The directory of this side of the migration.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The migration has ended and nothing is in doubt.
    pub fn remove(&self) {
        match fs::remove_file(self.pages_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("{} stays behind: {error}", self.pages_path().display());
            }
            _ => {}
        }
        // Who is killed half way leaves nothing that looks like a migration.
        let old = beside(&self.directory, UNFINISHED);
        let directory =
            if fs::rename(&self.directory, &old).is_ok() { &old } else { &self.directory };
        // By name: to look what is there takes a descriptor, and there may be none.
        for name in [JOURNAL, ABOUT, TAKEOVER, SOCKET] {
            for path in [directory.join(name), directory.join(name).with_extension("new")] {
                let _ = fs::remove_file(path);
            }
        }
        let removed = fs::remove_dir(directory);
        if let Err(error) = removed.or_else(|_| fs::remove_dir_all(directory)) {
            tracing::warn!("the journal {} stays behind: {error}", directory.display());
        }
    }
}

/// Removes a state directory that was made for one run, and the page tables of its migrations.
pub fn remove_state(state_dir: &Path) {
    for entry in fs::read_dir(state_dir).into_iter().flatten().flatten() {
        let _ = fs::remove_file(pages_path(&entry.path()));
    }
    let _ = fs::remove_dir_all(state_dir);
}

/// Where the page table of the destination is whose journal is in `directory`.
pub fn pages_path(directory: &Path) -> PathBuf {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    Path::new(PAGES_DIRECTORY).join(format!("farfault-{name}.pages"))
}

/// The directory of a migration while it is made, and while it is removed.
const UNFINISHED: &str = ".unfinished";
/// Longer than either takes.
const UNFINISHED_FOR: Duration = Duration::from_secs(60);

fn beside(directory: &Path, suffix: &str) -> PathBuf {
    let mut path = directory.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests;
