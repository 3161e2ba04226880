//! A picture of replays: how the orders of pages compare, guest by guest.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::chart::{
    Area, Axis, Figure, GREY, GRID, heading, letters, letters_in_the_middle, letters_to_the_left,
    line, marker, save, short,
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

const WIDTH: i32 = 1240;
const LEFT: i32 = 190;
const PANEL: i32 = 225;
const GAP: i32 = 32;
const TOP: i32 = 112;
const ROW: i32 = 52;
/// Ratios beyond are drawn at the edge.
const LEAST: f64 = 0.1;
const MOST: f64 = 10.0;

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
        let ends = [LEAST * 1.6, MOST / 1.6].into_iter();
        let axis = Axis::logarithmic(ends, (left, left + PANEL));
        for tick in [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0] {
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
            let Some(linear) = self.of(guest, PusherKind::Linear).map(value) else { continue };
            for (index, order) in PusherKind::ALL.into_iter().enumerate() {
                let Some(outcome) = self.of(guest, order) else { continue };
                // Below what is seen, equal is equal.
                let ratio = (value(outcome).max(1e-3) / linear.max(1e-3)).clamp(LEAST, MOST);
                // Side by side where they would hide each other.
                let y = TOP + ROW * row as i32 + 8 + 9 * index as i32;
                marker(area, index, (axis.at(ratio), y))?;
            }
        }
        Ok(())
    }
}

impl Figure for OrdersFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (TOP + ROW * self.guests().len() as i32 + 60) as u32)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let explanation = format!("{}; over that of linear, further left is better", self.about);
        heading(area, "Orders of pages after the switchover", &explanation)?;
        let mut x = LEFT;
        for (index, order) in PusherKind::ALL.into_iter().enumerate() {
            marker(area, index, (x, 72))?;
            area.draw(&Text::new(order.name(), (x + 12, 64), letters(15)))?;
            x += 110;
        }
        for (row, guest) in self.guests().into_iter().enumerate() {
            let middle = TOP + ROW * row as i32 + ROW / 2;
            let at = (LEFT - 14, middle);
            area.draw(&Text::new(guest.to_owned(), at, letters_to_the_left(15)))?;
            if row > 0 {
                let y = TOP + ROW * row as i32;
                line(area, &[(16, y), (WIDTH - 20, y)], GRID, 1)?;
            }
        }
        for (index, (name, value)) in PANELS.into_iter().enumerate() {
            self.panel(area, LEFT + (PANEL + GAP) * index as i32, name, value)?;
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
