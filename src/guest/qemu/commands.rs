//! QMP commands whose replies changed over QEMU's versions: read here only as far as we use them, so
//! that a field which one version adds or drops does not matter.

use qapi::{Command, Dictionary, Empty};
use serde::{Deserialize, Serialize};

macro_rules! command {
    ($(#[$doc:meta])* $type:ident { $($field:ident: $of:ty),* } = $name:literal -> $ok:ty) => {
        $(#[$doc])*
        #[derive(Debug, Serialize)]
        pub(super) struct $type { $(pub(super) $field: $of),* }

        impl Command for $type {
            type Ok = $ok;
            const NAME: &'static str = $name;
            const ALLOW_OOB: bool = false;
        }
    };
}

command! {
    /// In which state the virtual machine is.
    QueryStatus {} = "query-status" -> RunStatus
}

command! {
    /// How a migration stands.
    QueryMigrate {} = "query-migrate" -> MigrationState
}

command! {
    /// Which optional features of migration exist and are switched on.
    QueryCapabilities {} = "query-migrate-capabilities" -> Vec<Capability>
}

command! {
    /// Switches optional features of migration.
    SetCapabilities { capabilities: Vec<Capability> } = "migrate-set-capabilities" -> Empty
}

command! {
    /// The numbers and names that migration works with.
    QueryParameters {} = "query-migrate-parameters" -> Dictionary
}

/// Sets some of the numbers and names that migration works with.
#[derive(Debug, Serialize)]
pub(super) struct SetParameters(pub(super) Dictionary);

impl Command for SetParameters {
    type Ok = Empty;
    const NAME: &'static str = "migrate-set-parameters";
    const ALLOW_OOB: bool = false;
}

command! {
    /// The memory backends, those of the machine and those that nothing uses.
    QueryMemdev {} = "query-memdev" -> Vec<MemoryBackend>
}

command! {
    /// The vCPUs.
    QueryCpus {} = "query-cpus-fast" -> Vec<Cpu>
}

/// The nodes of the block layer: images, what they lie in, and what they are based on.
#[derive(Debug, Serialize)]
pub(super) struct QueryBlockNodes {
    /// True: no node's reply repeats all that it is based on, which would grow with the square of a chain's length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) flat: Option<bool>,
}

impl Command for QueryBlockNodes {
    type Ok = Vec<BlockNode>;
    const NAME: &'static str = "query-named-block-nodes";
    const ALLOW_OOB: bool = false;
}

/// Reply of [`QueryStatus`].
#[derive(Debug, Deserialize)]
pub(super) struct RunStatus {
    /// QEMU's `RunState`, such as `running`, `paused`, `postmigrate`, `inmigrate`.
    pub(super) status: String,
}

/// Reply of [`QueryMigrate`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct MigrationState {
    /// QEMU's `MigrationStatus`; none before the first migration.
    pub(super) status: Option<String>,
    /// Why it failed.
    pub(super) error_desc: Option<String>,
    /// Why the guest cannot be migrated.
    #[serde(default)]
    pub(super) blocked_reasons: Vec<String>,
}

impl MigrationState {
    /// True from the start of a migration until its success or failure.
    pub(super) fn is_active(&self) -> bool {
        !matches!(
            self.status.as_deref(),
            None | Some("none" | "completed" | "failed" | "cancelled")
        )
    }
}

/// One optional feature of migration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Capability {
    /// Its name.
    pub(super) capability: String,
    /// Whether it is switched on.
    pub(super) state: bool,
}

/// One memory backend.
#[derive(Debug, Deserialize)]
pub(super) struct MemoryBackend {
    /// The id given with `-object`, or the machine's own name for its default RAM.
    pub(super) id: Option<String>,
    /// In bytes.
    pub(super) size: u64,
    /// False where other processes cannot see the writes; absent in a QEMU before 6.1.
    #[serde(default)]
    pub(super) share: bool,
}

/// One node of the block layer.
#[derive(Debug, Deserialize)]
pub(super) struct BlockNode {
    /// Given by the user, or made up by QEMU.
    #[serde(default, rename = "node-name")]
    pub(super) name: String,
    /// Its driver, such as `qcow2` or `file`.
    pub(super) drv: String,
    /// Where its data is.
    #[serde(default)]
    pub(super) file: String,
    /// How it uses the host's page cache.
    pub(super) cache: Option<BlockCache>,
}

/// How a node of the block layer uses the host's page cache.
#[derive(Debug, Deserialize)]
pub(super) struct BlockCache {
    /// True where it goes past it (`O_DIRECT`).
    pub(super) direct: bool,
}

/// One vCPU.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Cpu {
    /// The host thread that runs it, numbered as QEMU's own PID namespace sees it.
    pub(super) thread_id: u32,
    /// The object of QEMU's tree.
    pub(super) qom_path: String,
    /// The architecture, as QEMU names it.
    #[serde(default)]
    pub(super) target: String,
}
