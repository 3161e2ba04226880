//! An emulated wide-area link: rate, delay, a bounded queue and random loss.
//!
//! The model of a link and the way people write one down are farfault's own ([`link`], [`spec`]), so
//! that `farfault demo` and this emulator show the same link. Here are [`tun`] devices in two network
//! namespaces ([`netns`]), the rows of packets that these give and take ([`offload`]), the [`emulator`] loop
//! between them, and the [`control`] language that changes the link while it runs.

pub mod control;
pub mod emulator;
pub mod offload;
pub mod tun;

pub use farfault::lab::{link, moderation, netns, spec};
