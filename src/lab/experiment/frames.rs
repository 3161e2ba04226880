//! A picture of a stream around the switchover: how late each frame was, a strip for each method.

use anyhow::Result;
use plotters::prelude::*;

use super::chart::{
    Area, Axis, COLOURS, Figure, GREY, TOP, WIDTH, letters_to_the_left, line, time,
};
use super::plots::{LEFT, RIGHT, SINCE_THE_STOP, horizontal};
use super::table::CellRuns;
use crate::lab::stage::stream::{BUFFER, StreamSeen};

/// Before the stop.
const BEFORE_S: f64 = 2.0;
/// Behind the first frame on the destination, and at most in all.
const AFTER_S: f64 = 2.0;
const MOST_S: f64 = 40.0;
/// What comes later is drawn at the edge.
const MOST_LATE_MS: f64 = 500.0;
const STRIP: i32 = 74;

/// Of one guest over one link.
pub(super) struct FramesFigure<'a> {
    pub(super) title: String,
    methods: Vec<(&'a str, &'a StreamSeen)>,
    /// Seconds, the stop being 0.
    last_s: f64,
}

impl<'a> FramesFigure<'a> {
    /// `None` of a guest that does not stream.
    pub(super) fn new(place: &str, cells: impl Iterator<Item = &'a CellRuns<'a>>) -> Option<Self> {
        let typical =
            |cell: &'a CellRuns<'a>| Some((cell.method, cell.typical()?.1.stream.as_ref()?));
        let methods: Vec<_> = cells.filter_map(typical).collect();
        let resumed_ms = methods.iter().filter_map(|(_, seen)| {
            seen.arrivals.iter().map(|(at_ms, _)| *at_ms).find(|at_ms| *at_ms > 0)
        });
        let last_s = (resumed_ms.max()? as f64 / 1e3 + AFTER_S).min(MOST_S);
        Some(FramesFigure {
            title: format!("Frames around the switchover: {place}"),
            methods,
            last_s,
        })
    }
}

impl Figure for FramesFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (TOP + STRIP * self.methods.len() as i32 + 60) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = format!(
            "How late the client had each frame; each strip is 0 to {}, later ones at its upper edge. Dashed: \
             what a buffer of {} makes up for.",
            time(MOST_LATE_MS),
            time(BUFFER.as_secs_f64() * 1e3)
        );
        (self.title.clone(), explanation)
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let foot = TOP + STRIP * self.methods.len() as i32;
        let x_axis = Axis::linear(-BEFORE_S, self.last_s, (LEFT, RIGHT));
        horizontal(area, &x_axis, (TOP, foot), SINCE_THE_STOP)?;
        for (index, (method, seen)) in self.methods.iter().enumerate() {
            let top = TOP + STRIP * index as i32;
            let (floor, colour) = (top + STRIP - 8, COLOURS[index % COLOURS.len()]);
            let y_axis = Axis::linear(0.0, MOST_LATE_MS, (floor, top + 6));
            let name =
                Text::new((*method).to_owned(), (LEFT - 12, top + 26), letters_to_the_left(16));
            area.draw(&name)?;
            let told = format!("{} missed, gap {}", seen.missed, time(seen.longest_gap_ms));
            area.draw(&Text::new(told, (LEFT - 12, top + 46), letters_to_the_left(13)))?;
            let y = y_axis.at(BUFFER.as_secs_f64() * 1e3);
            for dash in (LEFT..RIGHT).step_by(12) {
                line(area, &[(dash, y), (dash + 6, y)], GREY, 1)?;
            }
            for (at_ms, late_ms) in &seen.arrivals {
                let second = *at_ms as f64 / 1e3;
                if (-BEFORE_S..=self.last_s).contains(&second) {
                    let late = (*late_ms as f64).clamp(0.0, MOST_LATE_MS);
                    let place = (x_axis.at(second), y_axis.at(late));
                    area.draw(&Circle::new(place, 2, colour.filled()))?;
                }
            }
            line(area, &[(LEFT, floor), (RIGHT, floor)], GREY, 1)?;
        }
        let stop = x_axis.at(0.0);
        line(area, &[(stop, TOP), (stop, foot)], GREY, 2)
    }
}
