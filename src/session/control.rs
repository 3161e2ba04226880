//! Orders to a running migration: a socket in its directory, one JSON object a line each way.
//!
//! | request | answer |
//! |---|---|
//! | `{"command":"status"}` | [`Live`] |
//! | `{"command":"cancel"}` | [`Verdict`] |
//!
//! Whoever can enter the directory may ask: its owner. Lines are short, callers few, and none may take long.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::journal::SOCKET;
use crate::engine::{Failure, MigrationPhase};
use crate::report::{LinkState, Output, Progress};

/// Longest line, either way.
const LINE_LIMIT_BYTES: u64 = 4096;
/// Callers at a time.
const MAX_CALLERS: usize = 8;
/// For a caller's request and for its answer. A session that cannot answer within it is stuck.
const PATIENCE: Duration = Duration::from_secs(5);

/// What may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
enum Request {
    /// How it stands.
    Status,
    /// End it, if it can still be ended.
    Cancel,
}

/// How a migration stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Live {
    /// The phase; none before the first.
    pub phase: Option<MigrationPhase>,
    /// The link to the other side.
    pub link: LinkState,
    /// The last progress told; none before the link.
    pub progress: Option<Progress>,
}

/// What became of the wish to cancel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// True when the migration ends now.
    pub accepted: bool,
    /// Why not.
    pub reason: Option<String>,
}

impl Verdict {
    /// It ends now.
    pub(super) fn accepted() -> Self {
        Verdict { accepted: true, reason: None }
    }

    /// It goes on.
    pub(super) fn refused(reason: &str) -> Self {
        Verdict { accepted: false, reason: Some(reason.to_owned()) }
    }
}

/// Somebody's wish to end the migration, to be answered.
pub(super) type CancelRequest = oneshot::Sender<Verdict>;

/// The listening socket; closed and removed when dropped.
pub(super) struct Control {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Control {
    /// Listens in `directory`, and takes the place of a socket that a dead owner has left.
    pub(super) fn serve(
        directory: &Path,
        output: Arc<Output>,
        cancels: mpsc::Sender<CancelRequest>,
    ) -> io::Result<Self> {
        let path = directory.join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = through_directory(directory, |short| UnixListener::bind(short))?;
        // The directory keeps others out in the moment before this.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let task = tokio::spawn(answer_callers(listener, output, cancels));
        Ok(Control { path, task })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path);
    }
}

/// A socket's path may have 107 bytes only; a directory's any number.
fn through_directory<T>(
    directory: &Path,
    call: impl FnOnce(&Path) -> io::Result<T>,
) -> io::Result<T> {
    let directory = fs::File::open(directory)?;
    call(Path::new(&format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd())))
}

async fn answer_callers(
    listener: UnixListener,
    output: Arc<Output>,
    cancels: mpsc::Sender<CancelRequest>,
) {
    let places = Arc::new(Semaphore::new(MAX_CALLERS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("the control socket: {error}");
                tokio::time::sleep(PATIENCE).await;
                continue;
            }
        };
        let (output, cancels) = (output.clone(), cancels.clone());
        tokio::spawn(async move {
            let _place = place;
            let answered = tokio::time::timeout(2 * PATIENCE, answer(stream, &output, &cancels));
            if let Ok(Err(error)) = answered.await {
                tracing::debug!("a caller at the control socket: {error}");
            }
        });
    }
}

/// One request, one answer.
async fn answer(
    mut stream: tokio::net::UnixStream,
    output: &Output,
    cancels: &mpsc::Sender<CancelRequest>,
) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(reader.take(LINE_LIMIT_BYTES));
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await??;
    let mut reply = match serde_json::from_str(&line) {
        Ok(Request::Status) => {
            let (phase, link, progress) = output.last();
            serde_json::to_vec(&Live { phase, link, progress })
        }
        Ok(Request::Cancel) => serde_json::to_vec(&cancel(cancels).await),
        Err(error) => {
            serde_json::to_vec(&serde_json::json!({ "error": format!("not a request: {error}") }))
        }
    }
    .expect("plain data");
    reply.push(b'\n');
    writer.write_all(&reply).await
}

async fn cancel(cancels: &mpsc::Sender<CancelRequest>) -> Verdict {
    let (ask, answer) = oneshot::channel();
    let ended = || Verdict::refused("the migration is ending already");
    if cancels.send(ask).await.is_err() {
        return ended();
    }
    answer.await.unwrap_or_else(|_| ended())
}

/// How the migration in `directory` stands. `None` when nobody answers there: its owner is dead, or
/// just ends.
pub fn ask_status(directory: &Path) -> Option<Live> {
    call(directory, Request::Status).ok()
}

/// Asks for the migration in `directory` to end.
///
/// # Errors
/// When nobody answers there.
pub fn ask_cancel(directory: &Path) -> Result<Verdict, Failure> {
    call(directory, Request::Cancel).map_err(|error| {
        let text = format!("nobody answers at {}: {error}", directory.join(SOCKET).display());
        Failure::new(text, "`farfault status` says how this migration stands")
    })
}

fn call<T: serde::de::DeserializeOwned>(directory: &Path, request: Request) -> io::Result<T> {
    let mut stream = through_directory(directory, |short| UnixStream::connect(short))?;
    stream.set_read_timeout(Some(2 * PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(&request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    BufReader::new(stream.take(LINE_LIMIT_BYTES)).read_line(&mut reply)?;
    Ok(serde_json::from_str(&reply)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Desk {
        directory: tempfile::TempDir,
        output: Arc<Output>,
        cancels: mpsc::Receiver<CancelRequest>,
        _control: Control,
    }

    fn desk() -> Desk {
        let directory = tempfile::tempdir().unwrap();
        let output = Arc::new(Output::new(true));
        let (sender, cancels) = mpsc::channel(1);
        let _control = Control::serve(directory.path(), output.clone(), sender).unwrap();
        Desk { directory, output, cancels, _control }
    }

    async fn off_the_runtime<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
        tokio::task::spawn_blocking(f).await.unwrap()
    }

    fn say(directory: &Path, bytes: &[u8]) -> String {
        let mut stream = through_directory(directory, |short| UnixStream::connect(short)).unwrap();
        let _ = stream.write_all(bytes);
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).unwrap_or_default();
        reply
    }

    #[tokio::test]
    async fn the_status_is_what_was_told_last() {
        let desk = desk();
        let path = desk.directory.path().to_owned();
        let asked = path.clone();
        let live = off_the_runtime(move || ask_status(&asked)).await.unwrap();
        assert_eq!((live.phase, live.link), (None, LinkState::Waiting));
        desk.output.phase(MigrationPhase::Precopy);
        desk.output.progress(Progress { remaining_pages: 7, ..Progress::default() });
        desk.output.link(LinkState::Up);
        let live = off_the_runtime(move || ask_status(&path)).await.unwrap();
        assert_eq!((live.phase, live.link), (Some(MigrationPhase::Precopy), LinkState::Up));
        assert_eq!(live.progress.unwrap().remaining_pages, 7);
    }

    #[tokio::test]
    async fn a_cancel_gets_the_answer_of_the_session() {
        for verdict in [Verdict::accepted(), Verdict::refused("it is decided")] {
            let mut desk = desk();
            let path = desk.directory.path().to_owned();
            let asked = tokio::task::spawn_blocking(move || ask_cancel(&path));
            desk.cancels.recv().await.unwrap().send(verdict.clone()).unwrap();
            assert_eq!(asked.await.unwrap().unwrap(), verdict);
        }
    }

    #[tokio::test]
    async fn a_session_that_ends_meanwhile_refuses() {
        let mut desk = desk();
        desk.cancels.close();
        let path = desk.directory.path().to_owned();
        let verdict = off_the_runtime(move || ask_cancel(&path)).await.unwrap();
        assert!(!verdict.accepted && verdict.reason.is_some());
    }

    #[tokio::test]
    async fn what_is_no_request_is_told_so_and_harms_nobody() {
        let desk = desk();
        let path = desk.directory.path().to_owned();
        let replies = off_the_runtime(move || {
            let long = [b'x'; 3 * LINE_LIMIT_BYTES as usize];
            let words: [&[u8]; 4] = [b"{}\n", b"\xff\xfe\n", b"{\"command\":\"fly\"}\n", &long];
            let replies = words.map(|bytes| say(&path, bytes));
            assert!(ask_status(&path).is_some(), "it still answers");
            replies
        })
        .await;
        for reply in [&replies[0], &replies[2], &replies[3]] {
            assert!(reply.is_empty() || reply.contains("error"), "{reply}");
        }
    }

    #[tokio::test]
    async fn callers_that_say_nothing_are_few_and_do_not_stay() {
        let desk = desk();
        let path = desk.directory.path().to_owned();
        let _silent: Vec<UnixStream> = (0..MAX_CALLERS)
            .map(|_| through_directory(&path, |short| UnixStream::connect(short)).unwrap())
            .collect();
        // All of them are shown the door.
        let asked = move || (0..3).find_map(|_| ask_status(&path));
        assert!(off_the_runtime(asked).await.is_some());
    }

    #[tokio::test]
    async fn a_socket_is_private_takes_the_place_of_a_stale_one_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        // However long the name of the directory is.
        let deep = directory.path().join("d".repeat(200));
        fs::create_dir(&deep).unwrap();
        drop(through_directory(&deep, |short| std::os::unix::net::UnixListener::bind(short)));
        assert!(ask_status(&deep).is_none(), "nobody listens at a stale socket");
        let (sender, _cancels) = mpsc::channel(1);
        let control = Control::serve(&deep, Arc::new(Output::new(true)), sender).unwrap();
        let socket = deep.join(SOCKET);
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let path = deep.clone();
        assert!(off_the_runtime(move || ask_status(&path)).await.is_some());
        drop(control);
        assert!(!socket.exists() && ask_status(&deep).is_none());
    }
}
