//! A destination QEMU that farfault starts itself.
//!
//! It shall outlive farfault, once the guest runs in it: it has its own process group, so that a
//! Ctrl-C meant for farfault does not reach it, no terminal to read from, and its output goes to a
//! file instead of a pipe that would break or hold a shell's pipeline open. A service manager that
//! ends a whole unit at once (systemd: `KillMode=control-group`) must be told to let it live
//! (`KillMode=process`).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::guards::{has_option, option_value};
use super::qmp::{Qmp, QmpError};
use super::{failure, refusal};
use crate::guest::GuestError;

/// How long QEMU may take until it answers: it may have to fill all RAM first (`prealloc=on`).
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a killed QEMU may take to end: its memory has to be given back.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// QEMU's QMP socket, in a directory that only its user can enter.
pub(super) const SOCKET_NAME: &str = "qmp.sock";

/// How much of the end of QEMU's output an error quotes.
const QUOTE_BYTES: u64 = 1024;

/// How to start a destination QEMU.
#[derive(Clone, Debug)]
pub struct SpawnOptions {
    /// The program and its arguments; `-incoming defer`, `-S` and a QMP socket are added as needed.
    pub command: Vec<OsString>,
    /// Where QEMU's output goes, appended. Without it: to a file without a name, which goes when QEMU
    /// ends and can be read meanwhile as `/proc/PID/fd/2`.
    pub log: Option<PathBuf>,
}

/// A QEMU that is our child. Dropped while it is still ours, also by a panic, it is ended.
#[derive(Debug)]
pub(super) struct Spawned {
    child: Child,
    /// Holds its QMP socket. Left behind if farfault is killed, so that a successor finds the socket.
    directory: Option<TempDir>,
    log: File,
    /// What the log file held before QEMU started, in bytes.
    log_start: u64,
    /// RAM files that did not exist before QEMU started.
    new_ram_files: Vec<PathBuf>,
    /// False once the guest runs in it, or it is let go of or ended.
    ours: bool,
}

/// Starts QEMU and connects to it.
pub(super) fn spawn(options: &SpawnOptions) -> Result<(Spawned, Qmp), GuestError> {
    let directory = private_directory()
        .map_err(|e| failure(format!("cannot make a directory for QEMU's QMP socket: {e}")))?;
    let socket = directory.path().join(SOCKET_NAME);
    let arguments = destination_arguments(&options.command, &socket)?;
    let program = &options.command[0];
    let (log, log_start) = open_log(options.log.as_deref())?;
    let output = || log.try_clone().map(Stdio::from);
    let start = || {
        Command::new(program)
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(output()?)
            .stderr(output()?)
            .process_group(0)
            .spawn()
    };
    let new_ram_files = ram_files(&arguments).into_iter().filter(|path| !path.exists()).collect();
    let child = start().map_err(|e| {
        refusal(
            format!("cannot start {}: {e}", program.to_string_lossy()),
            "give QEMU's program, such as qemu-system-x86_64, after --",
        )
    })?;
    let mut spawned =
        Spawned { child, directory: Some(directory), log, log_start, new_ram_files, ours: true };
    let qmp = spawned.connect(&socket)?;
    Ok((spawned, qmp))
}

impl Spawned {
    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and what it said, for an error.
    pub(super) fn obituary(&mut self) -> Option<String> {
        // The connection closes a moment before the process is gone.
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(self.ended(status));
            }
            thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Its QMP socket, which stays until QEMU is let go or ended.
    pub(super) fn qmp_path(&self) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.path().join(SOCKET_NAME))
    }

    /// RAM files that it has made.
    pub(super) fn new_ram_files(&self) -> &[PathBuf] {
        &self.new_ram_files
    }

    /// Lets QEMU live on without us. A connection to its QMP socket works on, but no new one.
    pub(super) fn let_go(&mut self) {
        self.ours = false;
        self.remove_directory();
    }

    /// By names: to look what is there takes a descriptor, and there may be none.
    fn remove_directory(&mut self) {
        let Some(directory) = self.directory.take() else { return };
        let _ = fs::remove_file(directory.path().join(SOCKET_NAME));
        let _ = fs::remove_dir(directory.path());
    }

    /// Lets QEMU live on, with its QMP socket for whoever comes after us.
    pub(super) fn leave(&mut self) {
        self.ours = false;
        if let Some(directory) = self.directory.take() {
            let _ = directory.keep();
        }
    }

    /// The guest runs in it: from here on it does not end with us, whatever becomes of us. Its QMP socket stays for
    /// whoever comes after us, unless it is let go of.
    pub(super) fn runs(&mut self) {
        self.ours = false;
        if let Some(directory) = &mut self.directory {
            directory.disable_cleanup(true);
        }
    }

    /// Ends QEMU and removes the RAM files that it has made. Works while its threads wait for pages.
    pub(super) fn end(&mut self) -> Result<(), GuestError> {
        self.ours = false;
        // An error here means that it has ended by itself.
        let _ = self.child.kill();
        let deadline = Instant::now() + KILL_TIMEOUT;
        loop {
            match self.child.try_wait() {
                Ok(Some(_)) => break,
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                Ok(None) => {
                    return Err(failure(format!(
                        "QEMU (process {}) has not ended within {} s of SIGKILL",
                        self.pid(),
                        KILL_TIMEOUT.as_secs()
                    )));
                }
                Err(e) => return Err(failure(format!("cannot wait for QEMU to end: {e}"))),
            }
        }
        remove_ram_files(&std::mem::take(&mut self.new_ram_files));
        self.remove_directory();
        Ok(())
    }

    fn connect(&mut self, socket: &Path) -> Result<Qmp, GuestError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(failure(self.ended(status)));
            }
            match Qmp::connect(socket) {
                Ok(qmp) => return Ok(qmp),
                // Not there yet, or not yet served while QEMU builds the machine.
                Err(QmpError::Connect { .. } | QmpError::Silent { .. })
                    if Instant::now() < deadline =>
                {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(QmpError::Closed { .. }) => {
                    let said = self.obituary();
                    return Err(failure(said.unwrap_or_else(|| "QEMU hangs up on us".to_owned())));
                }
                Err(other) => return Err(other.into()),
            }
        }
    }

    fn ended(&self, status: ExitStatus) -> String {
        let how = match status.code() {
            Some(code) => format!("with exit status {code}"),
            None => format!("by a signal ({status})"),
        };
        match self.last_words() {
            Some(words) => format!("QEMU ended {how}: {words}"),
            None => format!("QEMU ended {how} and said nothing: is that a QEMU's command line?"),
        }
    }

    /// The end of QEMU's output, in one line.
    fn last_words(&self) -> Option<String> {
        let end = self.log.metadata().ok()?.size();
        let start = self.log_start.max(end.saturating_sub(QUOTE_BYTES));
        let mut words = vec![0; QUOTE_BYTES as usize];
        // Not by seeking: QEMU writes at the place that we would move.
        let length = self.log.read_at(&mut words, start).ok()?;
        let words = String::from_utf8_lossy(&words[..length]);
        let lines: Vec<&str> = words.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = self.end()
        {
            tracing::warn!("{error}");
        }
    }
}

/// Removes RAM files of a QEMU that has ended.
pub(super) fn remove_ram_files(paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("the RAM file {} stays behind: {error}", path.display());
        }
    }
}

/// For QEMU's socket: nobody else may connect to a monitor, which can do all that QEMU can.
fn private_directory() -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix("farfault-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
}

fn open_log(path: Option<&Path>) -> Result<(File, u64), GuestError> {
    let opened = match path {
        // Readable too, for errors that quote it.
        Some(path) => File::options().read(true).append(true).create(true).open(path),
        None => tempfile::tempfile(),
    };
    let log = opened.and_then(|file| Ok((file.metadata()?.size(), file)));
    match log {
        Ok((size, file)) => Ok((file, size)),
        Err(e) => {
            let name = path.map_or("without a name".to_owned(), |path| path.display().to_string());
            Err(failure(format!("cannot open QEMU's log file {name}: {e}")))
        }
    }
}

/// The arguments of the user, made into those of a waiting destination.
fn destination_arguments(command: &[OsString], socket: &Path) -> Result<Vec<OsString>, GuestError> {
    let Some((_, given)) = command.split_first() else {
        return Err(refusal(
            "no command to start QEMU with",
            "give it after --, such as `-- qemu-system-x86_64 -machine q35 ...`",
        ));
    };
    let words: Vec<String> = given.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    if has_option(&words, "daemonize") {
        return Err(refusal(
            "QEMU must not be started with -daemonize: farfault would lose sight of it",
            "leave -daemonize out; QEMU runs on when farfault has ended",
        ));
    }
    if let Some(uri) = option_value(&words, "incoming").filter(|uri| *uri != "defer") {
        return Err(refusal(
            format!("QEMU shall wait for its guest at {uri}, where farfault does not bring it"),
            "leave -incoming out, or make it -incoming defer",
        ));
    }
    let mut arguments = given.to_vec();
    let mut add = |more: &[&str]| arguments.extend(more.iter().map(OsString::from));
    if !has_option(&words, "incoming") {
        add(&["-incoming", "defer"]);
    }
    if !has_option(&words, "S") {
        add(&["-S"]);
    }
    // A comma in a value of QEMU's is written twice.
    let path = socket.to_string_lossy().replace(',', ",,");
    add(&["-qmp", &format!("unix:{path},server=on,wait=off")]);
    Ok(arguments)
}

/// The files named by `mem-path=`, also in JSON. A directory is not one: QEMU's file there has no name.
fn ram_files(arguments: &[OsString]) -> Vec<PathBuf> {
    let words = arguments.iter().map(|word| word.to_string_lossy());
    let paths = words.filter_map(|word| {
        if let Some((_, rest)) = word.split_once("mem-path=") {
            // Commas that are part of the name come in pairs.
            let joined = rest.replace(",,", "\0");
            return Some(joined.split(',').next()?.replace('\0', ","));
        }
        let json: serde_json::Value = serde_json::from_str(&word).ok()?;
        Some(json.get("mem-path")?.as_str()?.to_owned())
    });
    // Who removes them later may work in another directory.
    paths.map(|path| std::path::absolute(&path).unwrap_or_else(|_| path.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn arguments(line: &str) -> Result<String, GuestError> {
        let arguments = destination_arguments(&command(line), Path::new("/tmp/s"))?;
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        Ok(words.join(" "))
    }

    const QMP: &str = "-qmp unix:/tmp/s,server=on,wait=off";

    #[test]
    fn what_a_destination_needs_is_added_when_missing() {
        let added = format!("-m 1G -incoming defer -S {QMP}");
        assert_eq!(arguments("qemu -m 1G").unwrap(), added);
        assert_eq!(arguments("qemu -m 1G -incoming defer -S").unwrap(), added);
        assert_eq!(
            arguments("qemu --incoming defer").unwrap(),
            format!("--incoming defer -S {QMP}")
        );
    }

    #[test]
    fn a_command_that_cannot_be_a_destination_is_refused_with_advice() {
        for line in ["", "qemu -daemonize", "qemu -incoming tcp:0:4444"] {
            assert!(arguments(line).unwrap_err().hint.is_some(), "{line}");
        }
    }

    #[test]
    fn ram_files_are_found_in_both_forms_of_an_option() {
        let mut line = command("-object memory-backend-file,id=a,mem-path=/dev/shm/x,,y,share=on");
        line.push(r#"{"qom-type":"memory-backend-file","mem-path":"/dev/shm/z"}"#.into());
        assert_eq!(ram_files(&line), [Path::new("/dev/shm/x,y"), Path::new("/dev/shm/z")]);
    }

    #[test]
    fn an_early_end_is_told_with_what_the_program_said() {
        let mut command = command("sh -c");
        command.push("echo no such machine >&2; exit 3; #".into());
        let error = spawn(&SpawnOptions { command, log: None }).unwrap_err();
        assert_eq!(error.message, "QEMU ended with exit status 3: no such machine");
    }

    #[test]
    fn a_program_that_is_missing_is_told() {
        let options = SpawnOptions { command: command("/no/such/qemu"), log: None };
        assert!(spawn(&options).unwrap_err().message.contains("/no/such/qemu"));
    }
}
