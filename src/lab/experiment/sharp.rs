//! A bitmap with four pixels for each one that is drawn, so that letters can be read on any screen.

use plotters::style::{IntoFont, RGBAColor, TextStyle};
use plotters_backend::{
    BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingBackend, DrawingErrorKind,
};

/// Pixels of the bitmap on each side of one that is drawn.
pub(super) const PIXELS: u32 = 2;

/// Draws on another backend, which is [`PIXELS`] times as large on each side.
pub(super) struct Sharp<B>(pub(super) B);

type Done<B> = Result<(), DrawingErrorKind<<B as DrawingBackend>::ErrorType>>;

fn grow((x, y): BackendCoord) -> BackendCoord {
    (x * PIXELS as i32, y * PIXELS as i32)
}

/// A line of so many pixels more.
struct Thick(BackendColor, u32);

impl Thick {
    fn of(style: &impl BackendStyle) -> Self {
        Thick(style.color(), style.stroke_width() * PIXELS)
    }
}

impl BackendStyle for Thick {
    fn color(&self) -> BackendColor {
        self.0
    }

    fn stroke_width(&self) -> u32 {
        self.1
    }
}

impl<B: DrawingBackend> DrawingBackend for Sharp<B> {
    type ErrorType = B::ErrorType;

    fn get_size(&self) -> (u32, u32) {
        let (width, height) = self.0.get_size();
        (width / PIXELS, height / PIXELS)
    }

    fn ensure_prepared(&mut self) -> Done<B> {
        self.0.ensure_prepared()
    }

    fn present(&mut self) -> Done<B> {
        self.0.present()
    }

    fn draw_pixel(&mut self, point: BackendCoord, colour: BackendColor) -> Done<B> {
        let (x, y) = grow(point);
        let last = PIXELS as i32 - 1;
        self.0.draw_rect((x, y), (x + last, y + last), &colour, true)
    }

    fn draw_line<S: BackendStyle>(
        &mut self,
        from: BackendCoord,
        to: BackendCoord,
        style: &S,
    ) -> Done<B> {
        self.0.draw_path([grow(from), grow(to)], &Thick::of(style))
    }

    fn draw_rect<S: BackendStyle>(
        &mut self,
        upper_left: BackendCoord,
        bottom_right: BackendCoord,
        style: &S,
        fill: bool,
    ) -> Done<B> {
        self.0.draw_rect(grow(upper_left), grow(bottom_right), &Thick::of(style), fill)
    }

    fn draw_path<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        path: I,
        style: &S,
    ) -> Done<B> {
        self.0.draw_path(path.into_iter().map(grow), &Thick::of(style))
    }

    fn draw_circle<S: BackendStyle>(
        &mut self,
        centre: BackendCoord,
        radius: u32,
        style: &S,
        fill: bool,
    ) -> Done<B> {
        self.0.draw_circle(grow(centre), radius * PIXELS, &Thick::of(style), fill)
    }

    fn fill_polygon<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        corners: I,
        style: &S,
    ) -> Done<B> {
        self.0.fill_polygon(corners.into_iter().map(grow), style)
    }

    fn draw_text<T: BackendTextStyle>(
        &mut self,
        text: &str,
        style: &T,
        at: BackendCoord,
    ) -> Done<B> {
        let family = style.family();
        let font = (family.as_str(), style.size() * f64::from(PIXELS), style.style()).into_font();
        let BackendColor { alpha, rgb: (red, green, blue) } = style.color();
        let colour = RGBAColor(red, green, blue, alpha);
        let large = TextStyle::from(font).color(&colour).pos(style.anchor());
        let (x, y) = grow(at);
        // Twice, since the font is a light one.
        self.0.draw_text(text, &large, (x, y))?;
        self.0.draw_text(text, &large, (x + 1, y))
    }
}
