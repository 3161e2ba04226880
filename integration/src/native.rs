//! QEMU's own migration, for comparison, over the same link.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::lab::{ADDRESS_B, Lab};
use crate::qemu::Guest;
use crate::qmp::Qmp;

const PORT: u16 = 4444;
const POLL_EVERY: Duration = Duration::from_millis(20);
/// More than any link here: the link is the limit, not QEMU's option.
const MAX_BANDWIDTH_BYTES_PER_S: u64 = 10_000_000_000;

/// A way in which QEMU can move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Plain pre-copy.
    Precopy,
    /// Pre-copy with deltas; the cache is as large as the guest's memory.
    Xbzrle,
    /// Pre-copy over several connections, compressed.
    MultifdZstd,
    /// Post-copy from the end of the first pass on.
    Postcopy,
    /// The same, with a connection of their own for urgent pages.
    PostcopyPreempt,
}

/// All methods, with their names on the command line.
pub const METHODS: [(Method, &str); 5] = [
    (Method::Precopy, "qemu-precopy"),
    (Method::Xbzrle, "qemu-xbzrle"),
    (Method::MultifdZstd, "qemu-multifd-zstd"),
    (Method::Postcopy, "qemu-postcopy"),
    (Method::PostcopyPreempt, "qemu-postcopy-preempt"),
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
        found.ok_or_else(|| format!("{text} is not a method of QEMU's"))
    }
}

impl Method {
    fn is_postcopy(self) -> bool {
        matches!(self, Method::Postcopy | Method::PostcopyPreempt)
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Method::Precopy => &[],
            Method::Xbzrle => &["xbzrle"],
            Method::MultifdZstd => &["multifd"],
            Method::Postcopy => &["postcopy-ram"],
            Method::PostcopyPreempt => &["postcopy-ram", "postcopy-preempt"],
        }
    }

    /// Both sides must agree on it before they connect.
    fn prepare(self, qmp: &mut Qmp, memory_bytes: u64, downtime: Duration) -> Result<()> {
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
        qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }
}

/// A migration that has come to its end.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// When it was asked for.
    pub started: Instant,
    /// Until the source said that it is complete.
    pub took: Duration,
}

/// Moves a running guest to `destination`, which is prepared and not started. `None` when it was not
/// complete in time: then it was cancelled.
pub fn migrate(
    lab: &Lab,
    source: &Guest,
    destination: &mut Guest,
    method: Method,
    downtime: Duration,
    timeout: Duration,
) -> Result<Option<Done>> {
    destination.start(lab.b().name(), &["-incoming", "defer"])?;
    let (mut from, mut to) = (source.monitor()?, destination.monitor()?);
    let memory = from.execute("query-memory-size-summary", json!({}))?;
    let memory_bytes = memory["base-memory"].as_u64().context("size of memory")?;
    method.prepare(&mut to, memory_bytes, downtime)?;
    method.prepare(&mut from, memory_bytes, downtime)?;
    to.execute("migrate-incoming", json!({ "uri": format!("tcp:0.0.0.0:{PORT}") }))?;

    let started = Instant::now();
    from.execute("migrate", json!({ "uri": format!("tcp:{ADDRESS_B}:{PORT}") }))?;
    let mut in_postcopy = false;
    while started.elapsed() < timeout {
        let now = from.execute("query-migrate", json!({}))?;
        match now["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(Some(Done { started, took: started.elapsed() })),
            "failed" | "cancelled" | "postcopy-paused" => {
                bail!("QEMU's migration has failed: {now}; {}", destination.errors());
            }
            _ => {}
        }
        // The count goes to 2 when the first pass is over.
        let passes = now["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        if method.is_postcopy() && !in_postcopy && passes >= 2 {
            from.execute("migrate-start-postcopy", json!({}))?;
            in_postcopy = true;
        }
        std::thread::sleep(POLL_EVERY);
    }
    ensure!(!in_postcopy, "post-copy was not complete in {timeout:?}");
    from.execute("migrate_cancel", json!({}))?;
    Ok(None)
}
