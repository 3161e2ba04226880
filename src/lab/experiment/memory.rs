//! The memory at the destination over time, as a heat map.

use anyhow::Result;
use plotters::prelude::*;

use super::chart::{
    Area, Axis, Figure, INK, TOP, WIDTH, letters, letters_in_the_middle, letters_to_the_left, line,
    short, time as in_words,
};
use super::plots::SINCE_THE_STOP;
use crate::lab::stage::film::{MemoryFilm, STAGES};

const LEFT: i32 = 90;
const RIGHT: i32 = WIDTH - 30;
/// Of the map; the legend stands above it.
const MAP_TOP: i32 = TOP + 36;
const MAP_HEIGHT: i32 = 384;

/// From nothing to all that is wanted, darker; the stale copy, which is what a delta builds on, apart.
const STAGE_COLOURS: [(&str, RGBColor); STAGES] = [
    ("absent", RGBColor(232, 232, 232)),
    ("stale", RGBColor(230, 159, 0)),
    ("current, not mapped", RGBColor(86, 180, 233)),
    ("zero", RGBColor(190, 226, 214)),
    ("mapped: the guest's", RGBColor(0, 84, 140)),
];

/// One migration.
pub(super) struct MemoryFigure<'a> {
    pub(super) title: String,
    pub(super) film: &'a MemoryFilm,
    pub(super) memory_bytes: u64,
    /// From the last heartbeat on the source to the first on the destination.
    pub(super) downtime_ms: f64,
}

impl MemoryFigure<'_> {
    fn span(&self) -> Option<(f64, f64)> {
        let (first, last) = (self.film.frames.first()?, self.film.frames.last()?);
        Some((first.at_ms as f64 / 1e3, last.at_ms as f64 / 1e3))
    }

    fn draw_map<B: DrawingBackend>(&self, area: &Area<B>, time: &Axis) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let frames = &self.film.frames;
        // A frame lasts until the next one: `last` is the one that nothing follows.
        let columns: Vec<(i32, Vec<RGBColor>)> = frames
            .iter()
            .map(|frame| (time.at(frame.at_ms as f64 / 1e3), blend_all(&frame.shares())))
            .collect();
        let rows = columns.first().map_or(0, |(_, colours)| colours.len());
        for row in 0..rows {
            let edge = |row: usize| MAP_TOP + (row as i32 * MAP_HEIGHT) / rows as i32;
            // Neighbours of one colour are one rectangle: there are thousands.
            let mut from = 0;
            for index in 1..columns.len() {
                let is_last = index + 1 == columns.len();
                if columns[index].1[row] != columns[from].1[row] || is_last {
                    let corners = [(columns[from].0, edge(row)), (columns[index].0, edge(row + 1))];
                    let colour = columns[from].1[row];
                    area.draw(&Rectangle::new(corners, colour.filled()))?;
                    from = index;
                }
            }
        }
        Ok(())
    }
}

fn blend_all(cells: &[[f64; STAGES]]) -> Vec<RGBColor> {
    let channel = |shares: &[f64; STAGES], of: fn(RGBColor) -> u8| {
        let parts = shares.iter().zip(STAGE_COLOURS);
        parts.map(|(share, (_, colour))| share * f64::from(of(colour))).sum::<f64>().round() as u8
    };
    cells
        .iter()
        .map(|s| RGBColor(channel(s, |c| c.0), channel(s, |c| c.1), channel(s, |c| c.2)))
        .collect()
}

impl Figure for MemoryFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (MAP_TOP + MAP_HEIGHT + 56) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = "What the destination has of each part of the guest's memory. Colours mix where its pages \
             differ.";
        (self.title.clone(), explanation.to_owned())
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let Some((first, last)) = self.span() else { return Ok(()) };
        for (index, (name, colour)) in STAGE_COLOURS.iter().enumerate() {
            let x = LEFT + 170 * index as i32;
            area.draw(&Rectangle::new([(x, TOP - 8), (x + 16, TOP + 8)], colour.filled()))?;
            area.draw(&Text::new(*name, (x + 24, TOP - 8), letters(15)))?;
        }
        let foot = MAP_TOP + MAP_HEIGHT;
        let time = Axis::linear(first, last, (LEFT, RIGHT));
        self.draw_map(area, &time)?;
        for tick in time.ticks() {
            let x = time.at(tick);
            line(area, &[(x, foot), (x, foot + 5)], INK, 1)?;
            area.draw(&Text::new(short(tick), (x, foot + 16), letters_in_the_middle(14)))?;
        }
        let middle = ((LEFT + RIGHT) / 2, foot + 38);
        area.draw(&Text::new(SINCE_THE_STOP, middle, letters_in_the_middle(15)))?;
        let mib = self.memory_bytes as f64 / f64::from(1 << 20);
        let place = Axis::linear(0.0, mib, (MAP_TOP, foot));
        for tick in place.ticks() {
            let y = place.at(tick);
            line(area, &[(LEFT - 5, y), (LEFT, y)], INK, 1)?;
            area.draw(&Text::new(format!("{tick:.0}"), (LEFT - 10, y), letters_to_the_left(14)))?;
        }
        area.draw(&Text::new("MiB", (LEFT - 10, MAP_TOP - 16), letters_to_the_left(14)))?;
        let (stop, run) = (time.at(0.0), time.at(self.downtime_ms / 1e3));
        for x in [stop, run] {
            line(area, &[(x, MAP_TOP - 6), (x, foot)], INK, 2)?;
        }
        let text = format!("stands still for {}", in_words(self.downtime_ms));
        // On the side with more room.
        let label = if stop > (LEFT + RIGHT) / 2 {
            Text::new(text, (stop - 6, MAP_TOP - 12), letters_to_the_left(14))
        } else {
            Text::new(text, (run + 6, MAP_TOP - 20), letters(14))
        };
        area.draw(&label)?;
        Ok(())
    }
}
