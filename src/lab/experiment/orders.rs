//! A picture of replays: how the orders of pages compare, guest by guest.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::chart::{
    Area, Axis, Figure, GREY, GRID, letters, letters_in_the_middle, letters_to_the_left, line,
    marker, save, short,
};
use crate::engine::pusher::PusherKind;
use crate::lab::replay::Outcome;

/// What came of a guest under an order.
pub struct Replayed {
    /// Its name.
    pub guest: String,
    /// The order.
    pub order: PusherKind,
    /// What came out.
    pub outcome: Outcome,
}

/// Draws `orders.svg` and `orders.png` into a directory, which is made.
///
/// # Errors
/// What the file system says.
pub fn draw_orders(about: &str, replays: &[Replayed], directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    save(&OrdersFigure { about, replays }, directory, "orders")
}

struct OrdersFigure<'a> {
    about: &'a str,
    replays: &'a [Replayed],
}

type Value = fn(&Outcome) -> f64;

const PANELS: [(&str, Value); 4] = [
    ("waited in all", |outcome| outcome.waited.as_secs_f64()),
    ("longest wait", |outcome| outcome.longest.as_secs_f64()),
    ("faults that waited", |outcome| outcome.waits as f64),
    ("90 % of its pace again", |outcome| outcome.recovered.as_secs_f64()),
];

/// Of the longest name, and of a letter.
const NAME: i32 = 30;
const LETTER: i32 = 8;
const PANEL: i32 = 225;
const GAP: i32 = 32;
const TOP: i32 = 112;
const ROW: i32 = 52;
/// Ratios beyond are drawn at the edge.
const TICKS: [f64; 7] = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

impl OrdersFigure<'_> {
    fn guests(&self) -> Vec<&str> {
        let mut guests: Vec<&str> = self.replays.iter().map(|one| one.guest.as_str()).collect();
        guests.dedup();
        guests
    }

    fn of(&self, guest: &str, order: PusherKind) -> Option<&Outcome> {
        let found = self.replays.iter().find(|one| one.guest == guest && one.order == order);
        found.map(|one| &one.outcome)
    }

    /// To that of linear.
    fn ratio(&self, guest: &str, order: PusherKind, value: Value) -> Option<f64> {
        let [ours, linear] = [order, PusherKind::Linear].map(|order| self.of(guest, order));
        // Below what is seen, equal is equal.
        Some(value(ours?).max(1e-3) / value(linear?).max(1e-3))
    }

    /// The ticks around all ratios, the same for all panels.
    fn ends(&self) -> (f64, f64) {
        let each = |(_, value): (&str, Value)| {
            let replays = self.replays.iter();
            replays.filter_map(move |one| self.ratio(&one.guest, one.order, value))
        };
        let (mut least, mut most) = (0.5, 2.0);
        for ratio in PANELS.into_iter().flat_map(each) {
            let below = TICKS.into_iter().rev().find(|tick| *tick <= ratio);
            let above = TICKS.into_iter().find(|tick| *tick >= ratio);
            least = below.unwrap_or(TICKS[0]).min(least);
            most = above.unwrap_or(TICKS[TICKS.len() - 1]).max(most);
        }
        (least, most)
    }

    /// Where the panels begin.
    fn left(&self) -> i32 {
        let longest = self.guests().into_iter().map(|guest| guest.chars().count()).max();
        NAME + LETTER * longest.unwrap_or(0) as i32
    }

    fn width(&self) -> i32 {
        self.left() + (PANEL + GAP) * PANELS.len() as i32
    }

    fn panel<B: DrawingBackend>(
        &self,
        area: &Area<B>,
        left: i32,
        name: &str,
        value: Value,
    ) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let guests = self.guests();
        let foot = TOP + ROW * guests.len() as i32;
        let (least, most) = self.ends();
        let ends = [least * 1.6, most / 1.6].into_iter();
        let axis = Axis::logarithmic(ends, (left, left + PANEL));
        for tick in TICKS.into_iter().filter(|tick| (least..=most).contains(tick)) {
            let x = axis.at(tick);
            let colour = if tick == 1.0 { GREY } else { GRID };
            line(area, &[(x, TOP), (x, foot)], colour, 1)?;
            area.draw(&Text::new(short(tick), (x, foot + 14), letters_in_the_middle(13)))?;
        }
        area.draw(&Text::new(
            name.to_owned(),
            (left + PANEL / 2, TOP - 14),
            letters_in_the_middle(15),
        ))?;
        for (row, guest) in guests.iter().enumerate() {
            for (index, order) in PusherKind::ALL.into_iter().enumerate() {
                let Some(ratio) = self.ratio(guest, order, value) else { continue };
                // Side by side where they would hide each other.
                let y = TOP + ROW * row as i32 + 8 + 9 * index as i32;
                marker(area, index, (axis.at(ratio.clamp(least, most)), y))?;
            }
        }
        Ok(())
    }
}

impl Figure for OrdersFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (self.width() as u32, (TOP + ROW * self.guests().len() as i32 + 60) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = format!("{}; over that of linear, further left is better", self.about);
        ("Orders of pages after the switchover".to_owned(), explanation)
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let left = self.left();
        let mut x = left;
        for (index, order) in PusherKind::ALL.into_iter().enumerate() {
            marker(area, index, (x, 72))?;
            area.draw(&Text::new(order.name(), (x + 12, 63), letters(15)))?;
            x += 110;
        }
        for (row, guest) in self.guests().into_iter().enumerate() {
            let middle = TOP + ROW * row as i32 + ROW / 2;
            let at = (left - 14, middle);
            area.draw(&Text::new(guest.to_owned(), at, letters_to_the_left(15)))?;
            if row > 0 {
                let y = TOP + ROW * row as i32;
                line(area, &[(16, y), (self.width() - 20, y)], GRID, 1)?;
            }
        }
        for (index, (name, value)) in PANELS.into_iter().enumerate() {
            self.panel(area, left + (PANEL + GAP) * index as i32, name, value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn replays_of_two_guests_are_drawn_in_both_formats() {
        let replay = |(guest, order): (&str, PusherKind)| Replayed {
            guest: guest.to_owned(),
            order,
            outcome: Outcome {
                waits: 10,
                waited: Duration::from_millis(order.name().len() as u64),
                ..Outcome::default()
            },
        };
        let guests = ["one", "two"].into_iter();
        let all = guests.flat_map(|guest| PusherKind::ALL.map(|order| (guest, order)));
        let replays: Vec<Replayed> = all.map(replay).collect();
        let directory = tempfile::tempdir().unwrap();
        draw_orders("a test", &replays, directory.path()).unwrap();
        let svg = std::fs::read_to_string(directory.path().join("orders.svg")).unwrap();
        assert!(svg.contains("two") && svg.contains("bubbling"), "{svg}");
        assert!(directory.path().join("orders.png").exists());
    }
}
