//! A laboratory for a test, which is skipped where there cannot be one.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
pub use farfault::lab::stage::place::{ADDRESS_A, ADDRESS_B};
use farfault::lab::stage::place::{Image, Place, Tools, Turn};
use farfault_wan::spec::QueueLimit;

use crate::skip::skipped;

/// The losses of a lossy link are the same in every run of a test.
const SEED: u64 = 1;

/// A [`Place`] with the programs and the guest image of this workspace.
#[derive(Debug)]
pub struct Lab(Place);

impl Lab {
    /// Sets up a laboratory with a queue of one bandwidth-delay product, for a test that does not mind if
    /// the machine has other work too. `None`, with a loud word, where it cannot work: without root, or where programs
    /// are missing. With `FARFAULT_REQUIRE_LAB=1` that is an error.
    pub fn start(link: &str) -> Result<Option<Self>> {
        Self::open(link, Turn::Shared)
    }

    /// The same for a test of times and rates: it has the machine for itself.
    pub fn start_alone(link: &str) -> Result<Option<Self>> {
        Self::open(link, Turn::Alone)
    }

    fn open(link: &str, turn: Turn) -> Result<Option<Self>> {
        if let Err(error) = Place::requirements() {
            skipped(&format!("{error:#}"))?;
            return Ok(None);
        }
        let tools = Tools {
            farfault: workspace_program("FARFAULT_BIN", "farfault")?,
            wan: workspace_program("FARFAULT_WAN_BIN", "wan")?,
            image: guest_image()?,
        };
        Ok(Some(Lab(Place::open(Some(link.parse()?), QueueLimit::Bdp(1), SEED, tools, turn)?)))
    }
}

impl Deref for Lab {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.0
    }
}

impl DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Place {
        &mut self.0
    }
}

/// A program of this workspace: `variable` names it, or it is beside this test, built with the same
/// profile, and so with the same assertions.
pub fn workspace_program(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let test = std::env::current_exe()?;
    // Tests are in `deps`, beside which the programs are.
    let path = test.parent().and_then(Path::parent).context("a directory")?.join(name);
    ensure!(
        path.exists(),
        "there is no {}: run `cargo build --workspace --bins`, or set {variable}",
        path.display()
    );
    Ok(path)
}

/// The guest's kernel and initramfs; built when they are not up to date.
pub fn guest_image() -> Result<Image> {
    let script = workspace().join("tools/build-guest");
    let status = Command::new(&script).status().context("run tools/build-guest")?;
    ensure!(status.success(), "{} has failed", script.display());
    Image::in_directory(&workspace().join("target/guest"))
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_owned)
}
