//! An emulated wide-area link: rate, delay, a bounded queue and random loss.
//!
//! [`link`] is the model of one direction of a link. It has no socket and no clock, so it serves
//! this crate's TUN emulator, an in-process one, and simulations alike. [`spec`] reads link
//! descriptions as people write them (`100Mbit,40ms,0.1%`). The rest is the emulator: [`tun`]
//! devices in two network namespaces ([`netns`]), the [`emulator`] loop between them, and the
//! [`control`] language that changes the link while it runs.

pub mod control;
pub mod emulator;
pub mod link;
pub mod netns;
pub mod spec;
pub mod tun;
