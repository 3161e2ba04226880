//! The scenarios that farfault brings along.

use anyhow::{Context, Result};

use super::scenario::Scenario;

/// A scenario in the program.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// By which it is asked for.
    pub name: &'static str,
    /// As a file would have it.
    pub text: &'static str,
}

/// All of them.
pub const SHIPPED: &[Shipped] = &[
    Shipped { name: "paper", text: include_str!("../scenarios/paper.toml") },
    Shipped { name: "wan", text: include_str!("../scenarios/wan.toml") },
    Shipped { name: "loss", text: include_str!("../scenarios/loss.toml") },
    Shipped { name: "bytes", text: include_str!("../scenarios/bytes.toml") },
    Shipped { name: "faults", text: include_str!("../scenarios/faults.toml") },
    Shipped { name: "touches", text: include_str!("../scenarios/touches.toml") },
    Shipped { name: "estimate", text: include_str!("../scenarios/estimate.toml") },
    Shipped { name: "recovery", text: include_str!("../scenarios/recovery.toml") },
    Shipped { name: "huge", text: include_str!("../scenarios/huge.toml") },
    Shipped { name: "throughput", text: include_str!("../scenarios/throughput.toml") },
    Shipped { name: "smoke", text: include_str!("../scenarios/smoke.toml") },
];

impl Shipped {
    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        SHIPPED.iter().copied().find(|shipped| shipped.name == name)
    }

    /// What it says.
    pub fn scenario(self) -> Result<Scenario> {
        Scenario::parse(self.text).with_context(|| format!("scenario {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_scenario_can_be_run_and_says_what_it_shows() {
        for shipped in SHIPPED {
            let scenario = shipped.scenario().unwrap();
            assert!(!scenario.runs(&[]).is_empty(), "{}", shipped.name);
            assert!(!scenario.title.is_empty() && !scenario.about.is_empty(), "{}", shipped.name);
        }
        assert!(Shipped::named("paper").is_some() && Shipped::named("papers").is_none());
    }
}
