//! A client of QEMU's machine protocol (QMP) on its Unix socket, in which every wait has an end.
//!
//! The commands are the types of the `qapi` crate and those of [`super::commands`]. The framing is
//! our own, for three things: replies are matched to commands by number, so that a reply that comes
//! after its timeout is not taken for the next one; every length is bounded; and a descriptor can
//! travel with a command.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sockopt,
};
use nix::sys::time::TimeVal;
use qapi::Command;
use qapi::qmp::qmp_capabilities;
use serde::Deserialize;
use serde_json::Value;

/// How long a socket may take to accept us and to say that it is QMP.
const GREETING_TIMEOUT: Duration = Duration::from_secs(4);

/// How long a socket that exists may take until somebody listens on it.
const LISTEN_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a command may take: `stop` and `cont` flush and open disk images.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest line that QEMU may send. The longest in use lists the memory map: 100 KiB for a guest of
/// a hundred devices.
const LINE_LIMIT_BYTES: usize = 16 << 20;

/// Events kept until somebody waits for them; the oldest go first.
const EVENT_LIMIT: usize = 64;

/// What can go wrong between us and a QMP socket.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be reached at all.
    #[error("cannot connect to the QMP socket {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody listens, but says nothing.
    #[error("nothing greets us at {} within {} s", path.display(), GREETING_TIMEOUT.as_secs())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// What answers is not QMP.
    #[error("{} is not a QMP socket: it says {said:?}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The beginning of what it said.
        said: String,
    },
    /// QEMU ended, or closed the connection.
    #[error("QEMU closed its QMP connection during {during}")]
    Closed {
        /// The command that was under way.
        during: &'static str,
    },
    /// No reply in time.
    #[error("QEMU has not answered {command} within {} s", after.as_secs())]
    Timeout {
        /// The command.
        command: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// QEMU said no.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        reason: String,
        /// True when this QEMU does not have the command.
        unknown: bool,
    },
    /// The reply is not of the form that QMP documents.
    #[error("QEMU's reply to {command} cannot be read: {reason}")]
    Reply {
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The connection failed.
    #[error("the QMP connection failed during {during}: {source}")]
    Io {
        /// The command that was under way.
        during: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl QmpError {
    /// What a person can do about it.
    pub(super) fn hint(&self) -> Option<String> {
        let hint = match self {
            QmpError::Connect { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => {
                    "start QEMU with -qmp unix:PATH,server=on,wait=off and give that PATH"
                }
                io::ErrorKind::ConnectionRefused => {
                    "nobody listens there any more: the QEMU that made this socket has ended"
                }
                io::ErrorKind::PermissionDenied => "run farfault as root, or as the user of QEMU",
                _ => return None,
            },
            QmpError::Silent { .. } => {
                "a QMP socket serves one client at a time: if another program is connected to it, \
                 end that, or give QEMU a second one with -qmp unix:PATH,server=on,wait=off"
            }
            QmpError::NotQmp { .. } => {
                "-monitor makes a socket for people; farfault needs one made with \
                 -qmp unix:PATH,server=on,wait=off"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// The version of QEMU, as (major, minor, micro).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: Triple,
}

#[derive(Deserialize)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

/// Something that QEMU told without being asked.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Event {
    /// Its name, such as `MIGRATION`.
    #[serde(rename = "event")]
    pub(super) name: String,
    /// What belongs to it; null for many.
    #[serde(default)]
    pub(super) data: Value,
}

/// A connection to one QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    socket: UnixStream,
    /// Received, not yet a whole line.
    partial: Vec<u8>,
    /// How much of `partial` is known to hold no line end.
    searched: usize,
    events: VecDeque<Event>,
    next_id: u64,
    version: Version,
    /// How long a command may take.
    patience: Duration,
}

impl Qmp {
    /// Connects and leaves the greeting phase.
    pub(super) fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::greeted(open(path)?, path)
    }

    /// Leaves the greeting phase on a socket that was connected to `path`.
    pub(super) fn greeted(socket: UnixStream, path: &Path) -> Result<Self, QmpError> {
        let mut qmp = Qmp {
            socket,
            partial: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            next_id: 1,
            version: Version(0, 0, 0),
            patience: COMMAND_TIMEOUT,
        };
        qmp.version = qmp.greet(path)?;
        qmp.execute(&qmp_capabilities { enable: None })?;
        Ok(qmp)
    }

    /// Of the QEMU at the other end.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// So long may a command take from here on.
    #[cfg(test)]
    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// The process that made the listening socket, which need not be QEMU.
    pub(super) fn listener_pid(&self) -> Option<u32> {
        let peer = socket::getsockopt(&self.socket, sockopt::PeerCredentials).ok()?;
        u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0)
    }

    /// Sends a command and waits for its reply.
    pub(super) fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok, QmpError> {
        self.send(command, None)?;
        self.receive::<C>()
    }

    /// Sends a command and a descriptor with it, for `getfd`.
    pub(super) fn execute_with_fd<C: Command>(
        &mut self,
        command: &C,
        fd: BorrowedFd<'_>,
    ) -> Result<C::Ok, QmpError> {
        self.send(command, Some(fd))?;
        self.receive::<C>()
    }

    /// Sends a command without waiting for its reply, where QEMU may be slow to answer and nothing
    /// depends on it. A refusal goes to the log, when it comes.
    pub(super) fn tell<C: Command>(&mut self, command: &C) -> Result<(), QmpError> {
        self.send(command, None)?;
        self.next_id += 1;
        Ok(())
    }

    /// Runs a command of the monitor for people and gives its text, for the few things that QMP does not tell.
    pub(super) fn human(&mut self, line: &str) -> Result<String, QmpError> {
        self.execute(&qapi::qmp::human_monitor_command {
            cpu_index: None,
            command_line: line.to_owned(),
        })
    }

    /// The first event, among those kept and those to come, for which `wanted` gives a value; `None`
    /// when `timeout` passes first. Events before it are dropped.
    pub(super) fn wait_event<T>(
        &mut self,
        timeout: Duration,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> Result<Option<T>, QmpError> {
        let deadline = Instant::now() + timeout;
        loop {
            while let Some(event) = self.events.pop_front() {
                if let Some(found) = wanted(&event) {
                    return Ok(Some(found));
                }
            }
            match self.read_line(deadline, "a wait for events")? {
                Some(line) if self.take_event(&line) => {}
                Some(line) => {
                    if let Ok(reply) = serde_json::from_slice::<Reply>(&line) {
                        reply.log_late();
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// Waits until QEMU hangs up, which it does when it ends; false when `timeout` passes first.
    pub(super) fn wait_closed(&mut self, timeout: Duration) -> Result<bool, QmpError> {
        match self.wait_event(timeout, |_| None::<()>) {
            Ok(_) => Ok(false),
            Err(QmpError::Closed { .. }) => Ok(true),
            Err(other) => Err(other),
        }
    }

    /// Drops events that came before now.
    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn greet(&mut self, path: &Path) -> Result<Version, QmpError> {
        let silent = || QmpError::Silent { path: path.to_owned() };
        let not_qmp = |said: &[u8]| QmpError::NotQmp {
            path: path.to_owned(),
            said: String::from_utf8_lossy(&said[..said.len().min(80)]).trim().to_owned(),
        };
        let deadline = Instant::now() + GREETING_TIMEOUT;
        let line = loop {
            match self.read_line(deadline, "the greeting") {
                // QEMU may tell of what happens at this moment before it has seen that somebody else listens now.
                Ok(Some(line)) if self.take_event(&line) => {}
                Ok(Some(line)) => break line,
                // The monitor for people prompts without ending its line.
                Ok(None) if !self.partial.is_empty() => return Err(not_qmp(&self.partial)),
                Ok(None) | Err(QmpError::Closed { .. }) => return Err(silent()),
                Err(QmpError::Reply { .. }) => return Err(not_qmp(&self.partial)),
                Err(other) => return Err(other),
            }
        };
        let greeting: Greeting = serde_json::from_slice(&line).map_err(|_| not_qmp(&line))?;
        let Triple { major, minor, micro } = greeting.qmp.version.qemu;
        Ok(Version(major, minor, micro))
    }

    fn send<C: Command>(
        &mut self,
        command: &C,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), QmpError> {
        let framed =
            qapi::Execute { execute: PhantomData, arguments: command, id: Some(self.next_id) };
        let mut line = serde_json::to_vec(&framed)
            .map_err(|e| QmpError::Reply { command: C::NAME, reason: e.to_string() })?;
        line.push(b'\n');
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let mut sent = 0;
        while sent < line.len() {
            let control = [ControlMessage::ScmRights(&fds)];
            // The descriptor goes with the first byte, once.
            let control = if sent == 0 && fd.is_some() { &control[..] } else { &[] };
            let slices = [IoSlice::new(&line[sent..])];
            let flags = MsgFlags::MSG_NOSIGNAL;
            match socket::sendmsg::<()>(self.socket.as_raw_fd(), &slices, control, flags, None) {
                Ok(n) => sent += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return Err(QmpError::Timeout { command: C::NAME, after: COMMAND_TIMEOUT });
                }
                Err(Errno::EPIPE | Errno::ECONNRESET) => {
                    return Err(QmpError::Closed { during: C::NAME });
                }
                Err(e) => return Err(QmpError::Io { during: C::NAME, source: e.into() }),
            }
        }
        Ok(())
    }

    fn receive<C: Command>(&mut self) -> Result<C::Ok, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let deadline = Instant::now() + self.patience;
        let unreadable = |reason: String| QmpError::Reply { command: C::NAME, reason };
        loop {
            let Some(line) = self.read_line(deadline, C::NAME)? else {
                return Err(QmpError::Timeout { command: C::NAME, after: self.patience });
            };
            if self.take_event(&line) {
                continue;
            }
            let mut reply: Reply =
                serde_json::from_slice(&line).map_err(|e| unreadable(e.to_string()))?;
            if reply.id != Some(id) {
                reply.log_late();
                continue;
            }
            if let Some(error) = reply.error {
                let unknown = error.class == "CommandNotFound";
                return Err(QmpError::Refused { command: C::NAME, reason: error.desc, unknown });
            }
            return serde_json::from_value(reply.result.take())
                .map_err(|e| unreadable(e.to_string()));
        }
    }

    /// Keeps the line if it is an event.
    fn take_event(&mut self, line: &[u8]) -> bool {
        let Ok(event) = serde_json::from_slice::<Event>(line) else { return false };
        if self.events.len() == EVENT_LIMIT {
            self.events.pop_front();
        }
        self.events.push_back(event);
        true
    }

    /// The next line; `None` at the deadline.
    fn read_line(
        &mut self,
        deadline: Instant,
        during: &'static str,
    ) -> Result<Option<Vec<u8>>, QmpError> {
        let mut chunk = [0; 16 << 10];
        loop {
            if let Some(at) = self.partial[self.searched..].iter().position(|b| *b == b'\n') {
                let rest = self.partial.split_off(self.searched + at + 1);
                self.searched = 0;
                return Ok(Some(std::mem::replace(&mut self.partial, rest)));
            }
            self.searched = self.partial.len();
            if self.partial.len() > LINE_LIMIT_BYTES {
                let reason = format!("a line of more than {LINE_LIMIT_BYTES} bytes");
                return Err(QmpError::Reply { command: during, reason });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let failed = |source| QmpError::Io { during, source };
            self.socket.set_read_timeout(Some(left)).map_err(failed)?;
            match self.socket.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed { during }),
                Ok(n) => self.partial.extend_from_slice(&chunk[..n]),
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::TimedOut
                    | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Err(QmpError::Closed { during }),
                    _ => return Err(failed(e)),
                },
            }
        }
    }
}

#[derive(Deserialize)]
struct Reply {
    #[serde(rename = "return", default)]
    result: Value,
    error: Option<ReplyError>,
    id: Option<u64>,
}

impl Reply {
    /// For the reply to a command whose sender did not wait, or no longer.
    fn log_late(&self) {
        if let Some(error) = &self.error {
            tracing::warn!("QEMU refuses an earlier command: {}", error.desc);
        }
    }
}

#[derive(Deserialize)]
struct ReplyError {
    class: String,
    desc: String,
}

/// QEMU listens with a backlog of one: where other clients wait already, `connect` itself would
/// block for ever. A send timeout bounds it.
fn open(path: &Path) -> Result<UnixStream, QmpError> {
    let failed = |e: Errno| QmpError::Connect { path: path.to_owned(), source: e.into() };
    let socket =
        socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .map_err(failed)?;
    let set_send_timeout = |timeout: Duration| {
        let value = TimeVal::new(timeout.as_secs() as i64, 0);
        socket::setsockopt(&socket.as_fd(), sockopt::SendTimeout, &value).map_err(failed)
    };
    set_send_timeout(GREETING_TIMEOUT)?;
    let address = UnixAddr::new(path).map_err(failed)?;
    let begun = Instant::now();
    loop {
        match socket::connect(socket.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            // QEMU has made its socket and is about to listen: a moment ago it was started.
            Err(Errno::ECONNREFUSED) if begun.elapsed() < LISTEN_TIMEOUT => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::EAGAIN) => return Err(QmpError::Silent { path: path.to_owned() }),
            Err(e) => return Err(failed(e)),
        }
    }
    set_send_timeout(COMMAND_TIMEOUT)?;
    Ok(UnixStream::from(socket))
}
