//! What all pictures share: colours, letters, markers, and the two formats.

use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::sharp::{PIXELS, Sharp};

/// The palette of Okabe and Ito, which all common kinds of colour vision can tell apart; in an order in
/// which neighbours differ in lightness too.
pub(super) const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(204, 121, 167),
    RGBColor(110, 110, 110),
    RGBColor(0, 0, 0),
];
pub(super) const GREY: RGBColor = RGBColor(153, 153, 153);
pub(super) const INK: RGBColor = RGBColor(40, 40, 40);
pub(super) const GRID: RGBColor = RGBColor(225, 225, 225);

/// Most pictures are so wide.
pub(super) const WIDTH: i32 = 1000;
/// Where the heading ends.
pub(super) const TOP: i32 = 78;

const FONT: &str = "sans-serif";

pub(super) type Area<B> = DrawingArea<B, Shift>;

/// A picture.
pub(super) trait Figure {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// What it shows, and a line under it that explains.
    fn heading(&self) -> (String, String);

    /// Draws the rest of it, below [`TOP`], on a white area of that size.
    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static;
}

/// Saves a picture as `FILE.svg` and `FILE.png`.
pub(super) fn save(figure: &impl Figure, directory: &Path, file: &str) -> Result<()> {
    static FONTS: Once = Once::new();
    FONTS.call_once(|| {
        // A font that cannot be read shows when text is drawn.
        for style in [FontStyle::Normal, FontStyle::Bold] {
            let _ = register_font(FONT, style, epaint_default_fonts::UBUNTU_LIGHT);
        }
    });
    let [svg, png] = ["svg", "png"].map(|kind| directory.join(format!("{file}.{kind}")));
    let size = figure.size();
    paint(figure, SVGBackend::new(&svg, size).into_drawing_area())
        .with_context(|| format!("draw {}", svg.display()))?;
    let large = (size.0 * PIXELS, size.1 * PIXELS);
    paint(figure, Sharp(BitMapBackend::new(&png, large)).into_drawing_area())
        .with_context(|| format!("draw {}", png.display()))
}

fn paint<B: DrawingBackend>(figure: &impl Figure, area: DrawingArea<B, Shift>) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE)?;
    let (title, explanation) = figure.heading();
    area.draw(&Text::new(title, (16, 12), letters(21)))?;
    area.draw(&Text::new(explanation, (16, 38), letters(14)))?;
    figure.draw(&area)?;
    // Where a file that cannot be written shows.
    area.present().map_err(|error| anyhow!("{error}"))
}

/// Letters of a size in pixels.
pub(super) fn letters(pixels: u32) -> TextStyle<'static> {
    (FONT, pixels).into_font().color(&INK)
}

/// The same, anchored to the right.
pub(super) fn letters_to_the_left(pixels: u32) -> TextStyle<'static> {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    letters(pixels).pos(Pos::new(HPos::Right, VPos::Center))
}

/// The same, in the middle.
pub(super) fn letters_in_the_middle(pixels: u32) -> TextStyle<'static> {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    letters(pixels).pos(Pos::new(HPos::Center, VPos::Center))
}

/// A marker that differs from its neighbours in form too, and from the one that has its colour again.
pub(super) fn marker<B: DrawingBackend>(
    area: &Area<B>,
    index: usize,
    (x, y): (i32, i32),
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let style = COLOURS[index % COLOURS.len()].filled();
    match (index + index / COLOURS.len()) % 4 {
        0 => area.draw(&Circle::new((x, y), 5, style))?,
        1 => area.draw(&Rectangle::new([(x - 5, y - 5), (x + 5, y + 5)], style))?,
        2 => area.draw(&Polygon::new(vec![(x, y - 6), (x + 6, y + 5), (x - 6, y + 5)], style))?,
        _ => {
            let corners = vec![(x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y)];
            area.draw(&Polygon::new(corners, style))?;
        }
    }
    Ok(())
}

/// A line between pixels.
pub(super) fn line<B: DrawingBackend>(
    area: &Area<B>,
    points: &[(i32, i32)],
    colour: RGBColor,
    width: u32,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.draw(&PathElement::new(points.to_vec(), colour.stroke_width(width)))?;
    Ok(())
}

/// Values onto pixels, linearly or by their logarithm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    from: f64,
    to: f64,
    pixels: (i32, i32),
    logarithmic: bool,
}

impl Axis {
    /// `from` lies at the first pixel, `to` at the last.
    pub(super) fn linear(from: f64, to: f64, pixels: (i32, i32)) -> Self {
        let to = if to > from { to } else { from + 1.0 };
        Axis { from, to, pixels, logarithmic: false }
    }

    /// Around these values, which are positive.
    pub(super) fn logarithmic(
        values: impl Iterator<Item = f64> + Clone,
        pixels: (i32, i32),
    ) -> Self {
        let least = values.clone().fold(f64::INFINITY, f64::min).clamp(1e-3, 1e9);
        let most = values.fold(f64::NEG_INFINITY, f64::max).max(least);
        Axis { from: least / 1.6, to: most * 1.6, pixels, logarithmic: true }
    }

    /// Where a value lies.
    pub(super) fn at(&self, value: f64) -> i32 {
        let share = if self.logarithmic {
            (value.max(1e-9) / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        let (first, last) = (f64::from(self.pixels.0), f64::from(self.pixels.1));
        (first + share.clamp(-0.1, 1.1) * (last - first)).round() as i32
    }

    /// Round values for ticks.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let inside = |value: &f64| (self.from..=self.to).contains(value);
        if self.logarithmic {
            let decade = self.from.log10().floor() as i32;
            let decades = (decade..decade + 14).map(|exponent| 10f64.powi(exponent));
            let all = |steps: &[f64]| -> Vec<f64> {
                let of = |ten: f64| steps.iter().map(move |step| step * ten).collect::<Vec<_>>();
                decades.clone().flat_map(of).filter(inside).collect()
            };
            let few = all(&[1.0]);
            return match few.len() {
                0 | 1 => all(&[1.0, 1.5, 2.0, 3.0, 5.0, 7.0]),
                2 => all(&[1.0, 2.0, 5.0]),
                _ => few,
            };
        }
        let rough = (self.to - self.from) / 6.0;
        let ten = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * ten).into_iter().find(|s| *s >= rough);
        let step = step.unwrap_or(10.0 * ten);
        let first = (self.from / step).ceil() as i64;
        let last = (self.to / step).floor() as i64;
        (first..=last).map(|n| n as f64 * step).collect()
    }
}

/// A time for a person, to three digits.
pub(super) fn time(ms: f64) -> String {
    match ms {
        ..1e3 => format!("{ms:.0} ms"),
        ..1e4 => format!("{:.2} s", ms / 1e3),
        _ => format!("{:.1} s", ms / 1e3),
    }
}

/// A number on an axis.
pub(super) fn short(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 || (magnitude >= 1.0 && value.fract().abs() < 1e-9) {
        return match magnitude {
            1e6.. => format!("{} M", value / 1e6),
            1e4.. => format!("{} k", value / 1e3),
            _ => format!("{value:.0}"),
        };
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_puts_values_where_they_belong_and_has_some_round_ticks() {
        let axis = Axis::linear(-2.0, 8.0, (100, 200));
        assert_eq!((axis.at(-2.0), axis.at(3.0), axis.at(8.0)), (100, 150, 200));
        assert_eq!(axis.ticks(), [-2.0, 0.0, 2.0, 4.0, 6.0, 8.0]);
        for values in [[30.0, 40.0], [80.0, 200.0], [30.0, 3000.0], [0.5, 90_000.0], [7.0, 7.0]] {
            let axis = Axis::logarithmic(values.into_iter(), (300, 0));
            let ticks = axis.ticks();
            assert!((2..=7).contains(&ticks.len()), "{values:?}: {ticks:?}");
            assert!(ticks.windows(2).all(|pair| axis.at(pair[0]) > axis.at(pair[1])), "{ticks:?}");
        }
        let ten = Axis::logarithmic([10.0, 1000.0].into_iter(), (0, 100));
        assert_eq!(ten.at(100.0), 50);
    }

    #[test]
    fn numbers_on_an_axis_are_short() {
        assert_eq!(
            [0.0, 0.25, 300.0, 20_000.0, 3e6, -2.0].map(short),
            ["0", "0.25", "300", "20 k", "3 M", "-2"]
        );
        assert_eq!(
            [4.4, 555.0, 1142.0, 52_956.0].map(time),
            ["4 ms", "555 ms", "1.14 s", "53.0 s"]
        );
    }
}
