//! Whose journal it is.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::unix_ms;
use crate::engine::Failure;
use crate::guest::Whereabouts;
use crate::memory::adopt::ProcessIdentity;

/// A longer file is not one of ours.
const LIMIT_BYTES: u64 = 1 << 20;

/// Which end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The host that the guest leaves.
    Source,
    /// The host that it goes to.
    Destination,
}

impl Side {
    /// The side in the name of a directory.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        match name.split_once('.')?.1 {
            "source" => Some(Side::Source),
            "destination" => Some(Side::Destination),
            _ => None,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "source",
            Side::Destination => "destination",
        })
    }
}

/// Who works on one side of a migration, and on which guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The migration's id, the same on both hosts.
    pub migration: String,
    /// Which side this is.
    pub side: Side,
    /// When it began.
    pub begun_unix_ms: u64,
    /// The farfault that works on it.
    pub owner: ProcessIdentity,
    /// The guest's monitor.
    pub guest: Whereabouts,
}

impl About {
    /// This process begins to work on a migration.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn begin(migration: &str, side: Side, guest: Whereabouts) -> Result<Self, Failure> {
        let owner = ProcessIdentity::own()?;
        let migration = migration.to_owned();
        Ok(About { migration, side, begun_unix_ms: unix_ms(), owner, guest })
    }

    /// `MIGRATION.SIDE`.
    pub fn name(&self) -> String {
        format!("{}.{}", self.migration, self.side)
    }
}

/// Writes a file that only its owner can read, in place of what is there: whole, or not at all.
pub(super) fn write_json(path: &Path, value: &impl Serialize, sync: bool) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec_pretty(value).expect("plain data"))?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&new, path)
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let failed = |why: String| {
        Failure::new(
            format!("{} cannot be read: {why}", path.display()),
            "look into its directory; remove it when the case is settled",
        )
    };
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    file.take(LIMIT_BYTES).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| failed(error.to_string()))
}
