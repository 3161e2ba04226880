//! Who watches: a person at a terminal, a person who reads a log, or a program.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::process::name;
use super::protocol::SideEvent;
use crate::engine::Failure;
use crate::lab::relay::RelayTotals;
use crate::lab::spec::LinkSpec;
use crate::report::{Live, MapShape, Role, Screen, Step, draw};

/// For those without a picture.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// In `--json`: what the link has carried.
const LINK_INTERVAL: Duration = Duration::from_millis(250);

/// Where all goes that a run shows.
pub(super) struct Audience {
    medium: Medium,
    run: Run,
}

enum Medium {
    Picture(Screen),
    Lines,
    Json,
}

/// What belongs to one run.
struct Run {
    name: &'static str,
    begin: Instant,
    begin_unix_us: u64,
    live: Live,
    map: MapShape,
    told: Instant,
}

impl Run {
    fn new(name: &'static str, title: String, link_bytes_per_s: u64, map: MapShape) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Run {
            name,
            begin: Instant::now(),
            begin_unix_us: now.as_micros() as u64,
            live: Live::new(title, link_bytes_per_s),
            map,
            told: Instant::now(),
        }
    }
}

impl Audience {
    /// A picture on stderr when that is a terminal, else lines; or JSON lines on stdout.
    pub(super) fn new(json: bool) -> Self {
        let medium = match Screen::open().filter(|_| !json) {
            _ if json => Medium::Json,
            Some(screen) => Medium::Picture(screen),
            None => Medium::Lines,
        };
        let run = Run::new("", String::new(), 0, MapShape { columns: 0, rows: 0 });
        Audience { medium, run }
    }

    /// A run begins. Gives the cells of the memory map.
    pub(super) fn begin(&mut self, name: &'static str, title: String, link: &LinkSpec) -> usize {
        let map = match &mut self.medium {
            Medium::Picture(screen) => {
                screen.keep();
                screen.map_shape()
            }
            _ => MapShape { columns: 64, rows: 1 },
        };
        match self.medium {
            Medium::Lines => eprintln!("farfault: {title}"),
            Medium::Json => print_json(&json!({ "event": "run", "run": name, "title": title })),
            Medium::Picture(_) => {}
        }
        self.run = Run::new(name, title, link.rate.bits_per_s() / 8, map);
        self.show();
        map.cells()
    }

    /// Another step of the demo itself.
    pub(super) fn step(&mut self, step: Step) {
        if self.run.live.enter(step) {
            self.tell_step();
        }
    }

    /// A side has told something.
    pub(super) fn event(&mut self, side: Role, event: &SideEvent, value: Value) {
        let now = self.run.begin.elapsed();
        let live = &mut self.run.live;
        let mut another_step = false;
        match event {
            SideEvent::Phase { phase } if side == Role::Source => {
                another_step = live.phase(now, *phase);
            }
            SideEvent::Progress(progress) => live.progress(side, progress),
            SideEvent::Guest { unix_us, ops } => {
                let at = Duration::from_micros(unix_us.saturating_sub(self.run.begin_unix_us));
                live.guest.add(at, *ops);
            }
            SideEvent::Memory(map) => live.memory = map.clone(),
            SideEvent::Report(report) if side == Role::Destination => {
                live.remote_faults = report.remote_faults;
            }
            _ => {}
        }
        if let Medium::Json = self.medium {
            self.pass_on(side, event, value);
        } else if another_step {
            self.tell_step();
        }
    }

    /// The side's own line, with what tells runs and sides apart. A ticket is a secret, and nobody
    /// else's to use.
    fn pass_on(&self, side: Role, event: &SideEvent, mut value: Value) {
        if matches!(event, SideEvent::Ticket { .. }) {
            return;
        }
        if let Value::Object(fields) = &mut value {
            fields.insert("run".to_owned(), self.run.name.into());
            fields.insert("side".to_owned(), name(side).into());
        }
        print_json(&value);
    }

    /// What the link has carried; called ten times a second.
    pub(super) fn link(&mut self, totals: Option<RelayTotals>) {
        if let Some(RelayTotals { there, back }) = totals {
            let bytes = there.carried_bytes + back.carried_bytes;
            self.run.live.link.add(self.run.begin.elapsed(), bytes);
        }
        match self.medium {
            Medium::Picture(_) => self.show(),
            Medium::Lines if self.run.told.elapsed() >= LINE_INTERVAL => self.tell_step(),
            Medium::Json if self.run.told.elapsed() >= LINK_INTERVAL => {
                self.run.told = Instant::now();
                if let Some(totals) = totals {
                    let elapsed_ms = self.run.begin.elapsed().as_millis() as u64;
                    print_json(&json!({
                        "event": "carried", "run": self.run.name, "elapsed_ms": elapsed_ms,
                        "there": totals.there, "back": totals.back,
                    }));
                }
            }
            Medium::Lines | Medium::Json => {}
        }
    }

    /// Something for a person.
    pub(super) fn note(&mut self, text: &str) {
        match &mut self.medium {
            Medium::Picture(screen) => screen.note(text),
            Medium::Lines | Medium::Json => eprintln!("farfault: {text}"),
        }
    }

    /// A part of the result, for a person.
    pub(super) fn say(&mut self, text: &str) {
        match &mut self.medium {
            Medium::Json => {}
            Medium::Picture(screen) => {
                screen.keep();
                print(text);
            }
            Medium::Lines => print(text),
        }
    }

    /// The whole result, for a program.
    pub(super) fn verdict(&mut self, event: &impl Serialize) {
        if let Medium::Json = self.medium {
            print_json(event);
        }
    }

    /// Why it did not work.
    pub(super) fn error(&mut self, failure: &Failure) {
        if let Medium::Picture(screen) = &mut self.medium {
            screen.keep();
        }
        if let Medium::Json = self.medium {
            let Failure { reason, hint } = failure;
            print_json(&json!({ "event": "error", "message": reason, "hint": hint }));
        }
        eprintln!("farfault: error: {}", failure.reason);
        if let Some(hint) = &failure.hint {
            eprintln!("farfault: hint: {hint}");
        }
    }

    fn tell_step(&mut self) {
        let now = self.run.begin.elapsed();
        match self.medium {
            Medium::Picture(_) => self.show(),
            Medium::Lines => {
                self.run.told = Instant::now();
                eprintln!("farfault: {}", self.run.live.line(now));
            }
            Medium::Json => {}
        }
    }

    fn show(&mut self) {
        if let Medium::Picture(screen) = &mut self.medium {
            let now = self.run.begin.elapsed();
            screen.draw(&draw(&self.run.live, now, self.run.map, screen.width()));
        }
    }
}

fn print_json(value: &impl Serialize) {
    print(&serde_json::to_string(value).expect("plain data"));
}

/// Whoever reads may be gone: unlike `println!`, no panic.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
}
