//! QEMU's own migration, for comparison, over the same link.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Map, Value, json};

use super::place::{ADDRESS_B, Place};
use super::process::pause;
use super::qemu::Guest;
use super::qmp::Qmp;

const PORT: u16 = 4444;
const POLL_EVERY: Duration = Duration::from_millis(20);
/// More than any link here: the link is the limit, not QEMU's option.
const MAX_BANDWIDTH_BYTES_PER_S: u64 = 10_000_000_000;

/// The longest that QEMU can be told.
const MAX_DOWNTIME_MS: u64 = 2_000_000;

/// What both QEMUs call the key, and who has it.
const KEY_ID: &str = "farfault-lab-key";
const KEY_USER: &str = "qemu";

/// A way in which QEMU can move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Plain pre-copy.
    Precopy,
    /// Pre-copy whose guest is stopped after the first pass, whatever is left.
    PrecopyForced,
    /// Pre-copy with deltas; the cache is as large as the guest's memory.
    Xbzrle,
    /// Pre-copy over several connections, compressed.
    MultifdZstd,
    /// Pre-copy that slows the guest down until it converges.
    AutoConverge,
    /// Post-copy at once.
    Postcopy,
    /// Post-copy from the end of the first pass on.
    PostcopyAfterPass,
    /// The same, with a connection of their own for urgent pages.
    PostcopyPreempt,
    /// Post-copy at once, with that connection.
    PostcopyPreemptAtOnce,
}

/// All methods, with their names.
pub const METHODS: [(Method, &str); 9] = [
    (Method::Precopy, "precopy"),
    (Method::PrecopyForced, "precopy-forced"),
    (Method::Xbzrle, "xbzrle"),
    (Method::MultifdZstd, "multifd-zstd"),
    (Method::AutoConverge, "auto-converge"),
    (Method::Postcopy, "postcopy"),
    (Method::PostcopyAfterPass, "postcopy-after-pass"),
    (Method::PostcopyPreempt, "postcopy-preempt"),
    (Method::PostcopyPreemptAtOnce, "postcopy-preempt-at-once"),
];

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = METHODS.iter().find(|(method, _)| method == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = METHODS.iter().find(|(_, name)| *name == text).map(|(method, _)| *method);
        found.ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|(_, name)| *name).collect();
            format!("{text:?} is not a method of QEMU's; there are: {}", names.join(", "))
        })
    }
}

/// What ends the part of a migration in which the guest runs on at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The guest goes on at the destination, and fetches what it has not there.
    Postcopy,
    /// The guest stands still until all is there.
    Stop,
}

impl Method {
    /// What is done to it, and from which value of `dirty-sync-count` on: that is 1 when the first pass begins, 2
    /// when it is over.
    fn turn(self) -> Option<(Turn, u64)> {
        match self {
            Method::Postcopy | Method::PostcopyPreemptAtOnce => Some((Turn::Postcopy, 1)),
            Method::PostcopyAfterPass | Method::PostcopyPreempt => Some((Turn::Postcopy, 2)),
            Method::PrecopyForced => Some((Turn::Stop, 2)),
            Method::Precopy | Method::Xbzrle | Method::MultifdZstd | Method::AutoConverge => None,
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Method::Precopy | Method::PrecopyForced => &[],
            Method::Xbzrle => &["xbzrle"],
            Method::MultifdZstd => &["multifd"],
            Method::AutoConverge => &["auto-converge"],
            Method::Postcopy | Method::PostcopyAfterPass => &["postcopy-ram"],
            Method::PostcopyPreempt | Method::PostcopyPreemptAtOnce => {
                &["postcopy-ram", "postcopy-preempt"]
            }
        }
    }

    /// Both sides must agree on it before they connect.
    fn prepare(
        self,
        qmp: &mut Qmp,
        memory_bytes: u64,
        downtime: Duration,
        further: &Further,
    ) -> Result<()> {
        let on = |name: &&str| json!({ "capability": name, "state": true });
        let capabilities: Vec<Value> = self.capabilities().iter().map(on).collect();
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let mut parameters = json!({
            "max-bandwidth": MAX_BANDWIDTH_BYTES_PER_S,
            "downtime-limit": downtime.as_millis() as u64,
        });
        if self == Method::Xbzrle {
            parameters["xbzrle-cache-size"] = json!(memory_bytes.next_power_of_two());
        }
        if self == Method::MultifdZstd {
            parameters["multifd-compression"] = json!("zstd");
            parameters["multifd-channels"] = json!(2);
        }
        for (name, value) in &further.parameters {
            parameters[name] = value.clone();
        }
        if further.encrypted {
            parameters["tls-creds"] = json!(KEY_ID);
        }
        qmp.execute("migrate-set-parameters", parameters.clone())?;
        // QEMU 7.2 says yes to a `multifd-zstd-level` and keeps the one it had.
        let kept = qmp.execute("query-migrate-parameters", json!({}))?;
        for (name, value) in parameters.as_object().into_iter().flatten() {
            ensure!(
                kept[name] == *value,
                "QEMU was told {name} = {value} and has {}; its command line may help: arguments = [\"-global\", \
                 \"migration.{name}={value}\"]",
                kept[name]
            );
        }
        Ok(())
    }
}

/// What a scenario asks for beside the method.
#[derive(Clone, Debug, Default)]
pub struct Further {
    /// Of QEMU's migration, as `migrate-set-parameters` has them.
    pub parameters: Map<String, Value>,
    /// TLS, with a key that both sides have.
    pub encrypted: bool,
}

/// Makes a key and gives it to both sides.
fn share_key(place: &Place, from: &mut Qmp, to: &mut Qmp) -> Result<()> {
    let directory = place.path("tls");
    std::fs::create_dir(&directory)?;
    let mut key = [0; 32];
    SystemRandom::new().fill(&mut key).expect("the kernel gives random bytes");
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(directory.join("keys.psk"), format!("{KEY_USER}:{key}\n"))?;
    let mut credentials = json!({ "qom-type": "tls-creds-psk", "id": KEY_ID, "dir": directory });
    credentials["endpoint"] = json!("server");
    to.execute("object-add", credentials.clone())?;
    credentials["endpoint"] = json!("client");
    // Only a client is asked who it is.
    credentials["username"] = json!(KEY_USER);
    from.execute("object-add", credentials)?;
    Ok(())
}

/// A migration that has come to its end.
#[derive(Clone, Debug)]
pub struct Done {
    /// When it was asked for.
    pub started: Instant,
    /// Until the source said that it is complete.
    pub took: Duration,
    /// What `query-migrate` says at the end.
    pub report: Value,
}

/// A migration under way.
#[derive(Debug)]
pub struct Migration {
    method: Method,
    from: Qmp,
    /// When it was asked for.
    pub started: Instant,
}

impl Migration {
    /// Starts `destination`, which is prepared, sets both sides up and lets the guest be moved.
    pub fn begin(
        place: &Place,
        source: &Guest,
        destination: &mut Guest,
        method: Method,
        downtime: Duration,
        further: &Further,
    ) -> Result<Self> {
        destination.start(place.b().name(), &["-incoming", "defer"])?;
        let (mut from, mut to) = (source.monitor()?, destination.monitor()?);
        let memory = from.execute("query-memory-size-summary", json!({}))?;
        let memory_bytes = memory["base-memory"].as_u64().context("size of memory")?;
        if further.encrypted {
            share_key(place, &mut from, &mut to)?;
        }
        for side in [&mut to, &mut from] {
            method.prepare(side, memory_bytes, downtime, further)?;
        }
        to.execute("migrate-incoming", json!({ "uri": format!("tcp:0.0.0.0:{PORT}") }))?;
        let started = Instant::now();
        from.execute("migrate", json!({ "uri": format!("tcp:{ADDRESS_B}:{PORT}") }))?;
        Ok(Migration { method, from, started })
    }

    /// Waits for the end; `tick` is called again and again with the time since the start. `None` when
    /// it took longer than `limit`: then it was cancelled, or, in post-copy, left to be killed.
    pub fn finish(
        mut self,
        limit: Duration,
        mut tick: impl FnMut(Duration) -> Result<()>,
    ) -> Result<Option<Done>> {
        let mut turned = None;
        self.from.answer_within(limit)?;
        while self.started.elapsed() < limit {
            tick(self.started.elapsed())?;
            let now = self.from.execute("query-migrate", json!({}))?;
            match now["status"].as_str().unwrap_or_default() {
                "completed" => {
                    let took = self.started.elapsed();
                    return Ok(Some(Done { started: self.started, took, report: now }));
                }
                "failed" | "cancelled" | "postcopy-paused" => {
                    bail!("QEMU's migration has failed: {now}");
                }
                _ => {}
            }
            let passes = now["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            if let Some((turn, from)) = self.method.turn()
                && turned.is_none()
                && passes >= from
            {
                match turn {
                    Turn::Postcopy => self.from.execute("migrate-start-postcopy", json!({}))?,
                    Turn::Stop => {
                        let any = json!({ "downtime-limit": MAX_DOWNTIME_MS });
                        self.from.execute("migrate-set-parameters", any)?
                    }
                };
                turned = Some(turn);
            }
            pause(POLL_EVERY)?;
        }
        if turned != Some(Turn::Postcopy) {
            self.from.execute("migrate_cancel", json!({}))?;
        }
        Ok(None)
    }
}

/// Moves a running guest to `destination`, which is prepared and not started. `None` when it was not
/// complete in time.
pub fn migrate(
    place: &Place,
    source: &Guest,
    destination: &mut Guest,
    method: Method,
    downtime: Duration,
    limit: Duration,
) -> Result<Option<Done>> {
    Migration::begin(place, source, destination, method, downtime, &Further::default())?
        .finish(limit, |_| Ok(()))
        .with_context(|| destination.errors())
}
