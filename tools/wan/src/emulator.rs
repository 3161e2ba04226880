//! Carries packets between two TUN devices through two [`Link`]s: one thread, one `ppoll`.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;

use crate::control::{Answer, BothTotals, Command, LineBuffer};
use crate::link::{Link, LinkConfig};
use crate::moderation::Moderation;
use crate::offload::{Packet, Run, Sent};
use crate::spec::QueueLimit;
use crate::tun::{MAX_READ_BYTES, Tun};

/// Packets, or rows of them, taken from a device before the other one and the clock are looked at again.
const MAX_READS: usize = 64;
/// Users of the control socket at the same time.
const MAX_CLIENTS: usize = 8;

/// Where commands come from.
pub enum ControlSource {
    /// Standard input; its end is the end of the emulator. Answers go to standard output.
    Stdin,
    /// A listening Unix socket; several users, who come and go.
    Socket(UnixListener),
}

/// SIGTERM and SIGINT, held back from now on and read by [`Emulator::run`]. Made before anything
/// that must be removed again.
pub struct StopSignals(SignalFd);

impl StopSignals {
    /// Blocks the signals in this thread, and those that it starts.
    pub fn hold() -> Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGTERM);
        signals.add(Signal::SIGINT);
        signals.thread_block().context("block signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(StopSignals(SignalFd::with_flags(&signals, flags).context("make a signalfd")?))
    }
}

struct Client {
    stream: UnixStream,
    lines: LineBuffer,
}

/// A link between two devices, running.
pub struct Emulator {
    a: Tun,
    b: Tun,
    a_to_b: Link<Packet>,
    b_to_a: Link<Packet>,
    /// When `b` is shown what has arrived.
    at_b: Moderation,
    /// And when `a`.
    at_a: Moderation,
    origin: Instant,
    /// What is read.
    buffer: Vec<u8>,
    /// Headers of what is written.
    headers: Vec<u8>,
}

impl Emulator {
    /// The same properties in both directions; the seed decides which packets are lost.
    pub fn new(a: Tun, b: Tun, config: LinkConfig, seed: u64) -> Self {
        Emulator {
            a,
            b,
            a_to_b: Link::new(config, seed),
            b_to_a: Link::new(config, seed ^ u64::MAX),
            at_b: Moderation::default(),
            at_a: Moderation::default(),
            origin: Instant::now(),
            buffer: vec![0; MAX_READ_BYTES],
            headers: Vec::new(),
        }
    }

    /// Runs until `quit`, the end of standard input, SIGTERM or SIGINT; gives the totals.
    pub fn run(mut self, mut control: ControlSource, stop: &StopSignals) -> Result<BothTotals> {
        // A wake-up of 50 us too late, the kernel's usual slack, would be four packets at 1 Gbit/s.
        nix::sys::prctl::set_timerslack(1).context("set the timer slack")?;
        let stdin = std::io::stdin();
        let mut stdin_lines = LineBuffer::default();
        let mut clients: Vec<Client> = Vec::new();

        loop {
            let ready = self.wait(&stop.0, &control, stdin.as_fd(), &clients)?;
            self.carry(ready.devices)?;
            if ready.signal {
                break;
            }
            match &mut control {
                ControlSource::Stdin if ready.control => {
                    let mut bytes = [0; 4096];
                    let count = nix::unistd::read(&stdin, &mut bytes).context("read stdin")?;
                    if count == 0 {
                        break;
                    }
                    let mut out = std::io::stdout();
                    if self.obey_all(&mut stdin_lines, &bytes[..count], &mut out) {
                        break;
                    }
                }
                ControlSource::Socket(listener) if ready.control => {
                    if let Ok((stream, _)) = listener.accept()
                        && stream.set_nonblocking(true).is_ok()
                        && clients.len() < MAX_CLIENTS
                    {
                        clients.push(Client { stream, lines: LineBuffer::default() });
                    }
                }
                _ => {}
            }
            // From the back, so that removal leaves the indices in front as they are.
            let mut quit = false;
            for index in ready.clients.into_iter().rev() {
                let Client { stream, lines } = &mut clients[index];
                let mut bytes = [0; 4096];
                match stream.read(&mut bytes) {
                    Ok(count) if count > 0 => quit |= self.obey_all(lines, &bytes[..count], stream),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    _ => drop(clients.swap_remove(index)),
                }
            }
            if quit {
                break;
            }
        }
        Ok(self.totals())
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn totals(&mut self) -> BothTotals {
        let now = self.now();
        self.a_to_b.advance(now);
        self.b_to_a.advance(now);
        BothTotals { a_to_b: self.a_to_b.totals(), b_to_a: self.b_to_a.totals() }
    }

    /// Takes what those devices have that have something, and delivers what is due.
    fn carry(&mut self, [a_has, b_has]: [bool; 2]) -> Result<()> {
        let directions = [
            (&mut self.a_to_b, &mut self.at_b, &self.a, a_has, &self.b),
            (&mut self.b_to_a, &mut self.at_a, &self.b, b_has, &self.a),
        ];
        for (link, moderation, from, has, to) in directions {
            if has {
                take_in(link, from, &mut self.buffer, self.origin)?;
            }
            let now = self.origin.elapsed();
            if moderation.delivers(link, now) {
                deliver(link, to, &mut self.headers, now);
            }
        }
        Ok(())
    }

    fn wait(
        &self,
        signals: &SignalFd,
        control: &ControlSource,
        stdin: BorrowedFd<'_>,
        clients: &[Client],
    ) -> Result<Ready> {
        let control = match control {
            ControlSource::Stdin => stdin,
            ControlSource::Socket(listener) => listener.as_fd(),
        };
        let fixed = [self.a.as_fd(), self.b.as_fd(), signals.as_fd(), control];
        let all = fixed.into_iter().chain(clients.iter().map(|c| c.stream.as_fd()));
        let mut polled: Vec<PollFd<'_>> =
            all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let due = [(&self.a_to_b, &self.at_b), (&self.b_to_a, &self.at_a)].into_iter();
        let due = due.filter_map(|(link, moderation)| moderation.next_delivery(link));
        let timeout = due.min().map(|at| TimeSpec::from(at.saturating_sub(self.now())));
        match ppoll(&mut polled, timeout, None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for packets"),
        }
        let has = |index: usize| polled[index].any().unwrap_or(false);
        let clients = (0..clients.len()).filter(|i| has(fixed.len() + i)).collect();
        Ok(Ready { devices: [has(0), has(1)], signal: has(2), control: has(3), clients })
    }

    /// Carries out the commands in `bytes`; true for `quit`.
    fn obey_all(&mut self, lines: &mut LineBuffer, bytes: &[u8], out: &mut impl Write) -> bool {
        for line in lines.push(bytes) {
            let answer = match line.parse() {
                Ok(Command::Quit) => return true,
                Ok(command) => self.obey(command),
                Err(message) => Answer::Error { message },
            };
            // A user who does not want the answer has had the effect.
            let _ = out.write_all(answer.to_line().as_bytes()).and_then(|()| out.flush());
        }
        false
    }

    fn obey(&mut self, command: Command) -> Answer {
        let now = self.now();
        if matches!(command, Command::Totals | Command::Reset) {
            let totals = self.totals();
            if command == Command::Reset {
                self.a_to_b.reset_totals();
                self.b_to_a.reset_totals();
            }
            return Answer::Totals(totals);
        }
        for link in [&mut self.a_to_b, &mut self.b_to_a] {
            match command {
                Command::Cut => link.cut(now),
                Command::Restore => link.restore(now),
                Command::Rate(rate) => link.set_rate(now, rate),
                Command::Delay(delay) => link.set_delay(now, delay),
                Command::Loss(loss) => link.set_loss(now, loss),
                Command::Queue(queue) => {
                    link.set_queue_bytes(now, queue_bytes(queue, link.config()));
                }
                Command::Totals | Command::Reset | Command::Quit => {}
            }
        }
        Answer::Ok
    }
}

/// Offers to the link what the device has.
fn take_in(link: &mut Link<Packet>, from: &Tun, buffer: &mut [u8], origin: Instant) -> Result<()> {
    for _ in 0..MAX_READS {
        let Some(bytes) = from.receive(buffer)? else { break };
        let now = origin.elapsed();
        for packet in Sent::new(buffer[..bytes].to_vec()).packets() {
            let packet_bytes = packet.bytes();
            // Refused packets are in the totals; there is no one to tell.
            let _ = link.send(now, packet, packet_bytes);
        }
    }
    Ok(())
}

/// Hands over all that has arrived, in pieces as long as possible.
fn deliver(link: &mut Link<Packet>, to: &Tun, headers: &mut Vec<u8>, now: Duration) {
    let mut write = |run: Run| {
        let rest = run.encode(headers);
        to.deliver(headers, rest);
    };
    let mut run: Option<Run> = None;
    while let Some(packet) = link.arrived(now) {
        if !run.as_mut().is_some_and(|run| run.extend(&packet)) {
            run.replace(Run::of(packet)).map(&mut write);
        }
    }
    run.map(write);
}

fn queue_bytes(queue: QueueLimit, config: &LinkConfig) -> u64 {
    queue.bytes(config.rate, config.delay * 2)
}

/// What [`Emulator::wait`] has seen.
struct Ready {
    devices: [bool; 2],
    signal: bool,
    control: bool,
    clients: Vec<usize>,
}
