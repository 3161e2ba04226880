//! How long each phase of a migration took, and each part of one, in the order of time.

use std::borrow::Cow;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// Milliseconds by phase and by part of a phase. A part is named after its phase (`freeze.stop`) and
/// stands behind it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PhaseTimes(IndexMap<Cow<'static, str>, f64>);

impl PhaseTimes {
    /// Adds time. What comes for the first time is later than all before, but for a phase, which is
    /// known when it is over, after its parts; and for a part that is told of after its phase.
    pub fn add(&mut self, name: impl Into<Cow<'static, str>>, ms: f64) {
        let name = name.into();
        if let Some(sum) = self.0.get_mut(&name) {
            *sum += ms;
            return;
        }
        let is_akin = |other: &Cow<'_, str>| phase_of(other) == phase_of(&name);
        let place = if phase_of(&name) == name {
            self.0.keys().position(is_akin)
        } else {
            self.0.keys().rposition(is_akin).map(|last| last + 1)
        };
        self.0.shift_insert(place.unwrap_or(self.0.len()), name, ms);
    }

    /// Takes from the other side's times those that this side does not know.
    pub fn complete_by(&mut self, other: &PhaseTimes) {
        for (name, ms) in &other.0 {
            if !self.0.contains_key(name) {
                self.add(name.clone(), *ms);
            }
        }
    }

    /// All, in the order of time.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, ms)| (name.as_ref(), *ms))
    }
}

fn phase_of(name: &str) -> &str {
    name.split_once('.').map_or(name, |(phase, _)| phase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(list: &[(&'static str, f64)]) -> PhaseTimes {
        let mut times = PhaseTimes::default();
        list.iter().for_each(|(name, ms)| times.add(*name, *ms));
        times
    }

    fn names(times: &PhaseTimes) -> Vec<&str> {
        times.iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn phases_stand_in_the_order_of_time_with_their_parts_behind_them() {
        let mut source = times(&[
            ("connect", 1.0),
            ("precopy", 2.0),
            ("freeze.stop", 3.0),
            ("freeze.pack", 4.0),
            ("freeze", 8.0),
            ("offer", 5.0),
            ("commit", 6.0),
        ]);
        let destination =
            times(&[("connect", 9.0), ("offer.load", 1.0), ("offer", 9.0), ("commit.run", 2.0)]);
        source.complete_by(&destination);
        let order =
            "connect precopy freeze freeze.stop freeze.pack offer offer.load commit commit.run";
        assert_eq!(names(&source), order.split(' ').collect::<Vec<_>>());
        assert_eq!(source.iter().next(), Some(("connect", 1.0)), "each side knows its own best");
    }

    #[test]
    fn time_in_the_same_phase_adds_up() {
        let times = times(&[("precopy", 1.0), ("freeze", 2.0), ("precopy", 4.0)]);
        assert_eq!(times.iter().collect::<Vec<_>>(), [("precopy", 5.0), ("freeze", 2.0)]);
    }

    #[test]
    fn the_order_survives_json() {
        let times = times(&[("prepare", 1.0), ("commit", 2.0)]);
        let json = serde_json::to_value(&times).unwrap();
        assert_eq!(json.to_string(), r#"{"prepare":1.0,"commit":2.0}"#);
        assert_eq!(serde_json::from_value::<PhaseTimes>(json).unwrap(), times);
    }
}
