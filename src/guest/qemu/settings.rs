//! The migration settings of a QEMU: set for one move of device state, then put back as they were.

use qapi::Dictionary;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::commands::{
    Capability, QueryCapabilities, QueryParameters, SetCapabilities, SetParameters,
};
use super::qmp::{Qmp, QmpError};
use super::refusal;
use crate::guest::GuestError;

/// Leaves shared RAM out of the stream.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// Capabilities that a move of device state needs. All others are switched off: some write RAM into
/// the stream or out of it by other ways, some need a stream with a way back.
///
/// `late-block-activate` keeps the destination's hands off the disk images until `cont`, so that the
/// source can still take the guest back.
const WANTED: [&str; 3] = [IGNORE_SHARED, "events", "late-block-activate"];

/// Parameters that a move of device state needs: no limit on speed (QEMU takes bytes per second), no
/// TLS (the stream does not leave the host), the plain kind of migration.
fn wanted_parameters() -> [(&'static str, Value); 4] {
    [
        ("max-bandwidth", Value::from(u32::MAX)),
        ("tls-creds", Value::from("")),
        ("tls-hostname", Value::from("")),
        ("mode", Value::from("normal")),
    ]
}

/// What to put back.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct SavedSettings {
    capabilities: Vec<Capability>,
    parameters: Dictionary,
}

/// An error when this QEMU cannot leave shared RAM out of a migration.
pub(super) fn check(qmp: &mut Qmp) -> Result<(), GuestError> {
    let known = qmp.execute(&QueryCapabilities {})?;
    if known.iter().any(|c| c.capability == IGNORE_SHARED) {
        return Ok(());
    }
    Err(refusal(
        format!("QEMU {} is too old: it has no {IGNORE_SHARED} migration", qmp.version()),
        "use QEMU 4.0 or newer",
    ))
}

/// What a move of device state has to change, as it is now.
pub(super) fn current(qmp: &mut Qmp) -> Result<SavedSettings, QmpError> {
    let capabilities = qmp
        .execute(&QueryCapabilities {})?
        .into_iter()
        .filter(|c| c.state != WANTED.contains(&c.capability.as_str()))
        .collect();
    let now = qmp.execute(&QueryParameters {})?;
    let differing = wanted_parameters().into_iter().filter_map(|(name, value)| {
        let before = now.get(name).filter(|before| **before != value)?;
        Some((name.to_owned(), before.clone()))
    });
    Ok(SavedSettings { capabilities, parameters: differing.collect() })
}

/// Prepares for a move of device state. Changes only what differs.
pub(super) fn apply(qmp: &mut Qmp) -> Result<SavedSettings, QmpError> {
    let saved = current(qmp)?;
    let wanted = wanted_parameters().into_iter();
    let wanted: Dictionary = wanted
        .filter(|(name, _)| saved.parameters.contains_key(*name))
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let switched = saved.capabilities.iter().map(|c| Capability { state: !c.state, ..c.clone() });
    let set = |qmp: &mut Qmp| {
        set_capabilities(qmp, switched.collect())?;
        set_parameters(qmp, wanted)
    };
    match set(qmp) {
        Ok(()) => Ok(saved),
        Err(error) => {
            saved.restore(qmp);
            Err(error)
        }
    }
}

impl SavedSettings {
    /// Puts the settings back. Failure is told in the log only: it does no harm to this migration.
    pub(super) fn restore(self, qmp: &mut Qmp) {
        let restored = set_capabilities(qmp, self.capabilities)
            .and_then(|()| set_parameters(qmp, self.parameters));
        if let Err(error) = restored {
            tracing::warn!("QEMU's migration settings could not be put back: {error}");
        }
    }

    /// Has the settings put back without waiting for it: the main thread of a QEMU whose guest has
    /// just begun to run may stand at a page that has to come over the network.
    pub(super) fn restore_unwatched(self, qmp: &mut Qmp) -> Result<(), QmpError> {
        if !self.capabilities.is_empty() {
            qmp.tell(&SetCapabilities { capabilities: self.capabilities })?;
        }
        if !self.parameters.is_empty() {
            qmp.tell(&SetParameters(self.parameters))?;
        }
        Ok(())
    }
}

fn set_capabilities(qmp: &mut Qmp, capabilities: Vec<Capability>) -> Result<(), QmpError> {
    if !capabilities.is_empty() {
        qmp.execute(&SetCapabilities { capabilities })?;
    }
    Ok(())
}

fn set_parameters(qmp: &mut Qmp, parameters: Dictionary) -> Result<(), QmpError> {
    if !parameters.is_empty() {
        qmp.execute(&SetParameters(parameters))?;
    }
    Ok(())
}
