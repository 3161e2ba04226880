//! Guests that touch pages in ways that are easy to say: for comparisons that anybody can repeat.

use std::time::Duration;

use super::{Touch, Touches};
use crate::engine::heat::Heat;
use crate::page::{PageIndex, PageSet};

/// All names, for [`named`].
pub const NAMES: [&str; 8] =
    ["sequential", "backwards", "stride", "streams", "clusters", "hotcold", "random", "threads"];

/// A guest of so many pages, none of which are at the destination.
///
/// * `sequential`, `backwards`: one thread goes through all pages, 20 us each.
/// * `stride`: one thread touches each 17th page, and so on 17 times, 200 us each.
/// * `streams`: eight threads go through an eighth of memory each, 200 us each.
/// * `clusters`: one thread goes to a place at random and touches 12 pages from there on, 200 us each.
/// * `hotcold`: one thread, nine of ten touches on a tenth of the pages that lie together, 500 us each.
/// * `random`: one thread, 500 us each.
/// * `threads`: eight threads, each at random in its eighth, 500 us each.
pub fn named(name: &str, pages: u64) -> Option<Touches> {
    let mut dice = Dice(0x5eed);
    let one = |order: Vec<u64>, us: u64| vec![touches(order, us)];
    let eighth = pages / 8;
    let ops = pages;
    let threads = match name {
        "sequential" => one((0..pages).collect(), 20),
        "backwards" => one((0..pages).rev().collect(), 20),
        "stride" => one((0..17).flat_map(|from| (from..pages).step_by(17)).collect(), 200),
        "streams" => (0..8)
            .map(|thread| touches((thread * eighth..(thread + 1) * eighth).collect(), 200))
            .collect(),
        "clusters" => {
            let mut order = Vec::new();
            for _ in 0..ops / 12 {
                let place = dice.below(pages);
                order.extend((place..(place + 12).min(pages)).collect::<Vec<u64>>());
            }
            one(order, 200)
        }
        "hotcold" => {
            let (hot, from) = (pages / 10, pages / 3);
            let place = |dice: &mut Dice| match dice.below(10) {
                0 => dice.below(pages),
                _ => from + dice.below(hot),
            };
            one((0..ops).map(|_| place(&mut dice)).collect(), 500)
        }
        "random" => one((0..ops).map(|_| dice.below(pages)).collect(), 500),
        "threads" => (0..8)
            .map(|thread| {
                let place = |_| thread * eighth + dice.below(eighth);
                touches((0..ops / 8).map(place).collect(), 500)
            })
            .collect(),
        _ => return None,
    };
    Some(Touches { pages, need: PageSet::full(pages), heat: Heat::new(pages), threads })
}

fn touches(order: Vec<u64>, us: u64) -> Vec<Touch> {
    let after = Duration::from_micros(us);
    order.into_iter().map(|page| Touch { after, page: PageIndex(page) }).collect()
}

/// splitmix64: the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ x >> 31) % bound.max(1)
    }
}
