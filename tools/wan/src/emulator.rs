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
use crate::spec::QueueLimit;
use crate::tun::{MTU_BYTES, Tun};

/// Packets taken from a device before the other one and the clock are looked at again.
const BATCH_PACKETS: usize = 64;
/// Users of the control socket at the same time.
const MAX_CLIENTS: usize = 8;

type Packet = Vec<u8>;

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
    origin: Instant,
    /// Buffers to use again: one allocation per packet would be 80,000 a second at 1 Gbit/s.
    spare: Vec<Packet>,
}

impl Emulator {
    /// The same properties in both directions; the seed decides which packets are lost.
    pub fn new(a: Tun, b: Tun, config: LinkConfig, seed: u64) -> Self {
        Emulator {
            a,
            b,
            a_to_b: Link::new(config, seed),
            b_to_a: Link::new(config, seed ^ u64::MAX),
            origin: Instant::now(),
            spare: Vec::new(),
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
            self.carry()?;
            let ready = self.wait(&stop.0, &control, stdin.as_fd(), &clients)?;
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

    /// Takes what the devices have and delivers what is due.
    fn carry(&mut self) -> Result<()> {
        for (link, from, to) in
            [(&mut self.a_to_b, &self.a, &self.b), (&mut self.b_to_a, &self.b, &self.a)]
        {
            for _ in 0..BATCH_PACKETS {
                let mut packet = self.spare.pop().unwrap_or_default();
                packet.resize(MTU_BYTES, 0);
                let Some(bytes) = from.receive(&mut packet)? else {
                    self.spare.push(packet);
                    break;
                };
                packet.truncate(bytes);
                // Refused packets are in the totals; there is no one to tell.
                let _ = link.send(self.origin.elapsed(), packet, bytes as u32);
            }
            let now = self.origin.elapsed();
            while let Some(packet) = link.arrived(now) {
                to.deliver(&packet);
                self.spare.push(packet);
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
        let due = [&self.a_to_b, &self.b_to_a].iter().filter_map(|link| link.next_arrival()).min();
        let timeout = due.map(|at| TimeSpec::from(at.saturating_sub(self.now())));
        match ppoll(&mut polled, timeout, None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for packets"),
        }
        let has = |index: usize| polled[index].any().unwrap_or(false);
        let clients = (0..clients.len()).filter(|i| has(fixed.len() + i)).collect();
        Ok(Ready { signal: has(2), control: has(3), clients })
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

fn queue_bytes(queue: QueueLimit, config: &LinkConfig) -> u64 {
    queue.bytes(config.rate, config.delay * 2)
}

/// What [`Emulator::wait`] has seen, besides packets.
struct Ready {
    signal: bool,
    control: bool,
    clients: Vec<usize>,
}
