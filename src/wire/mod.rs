//! What goes over the network: page frames, and the limits on everything that is read from it.
//!
//! A page frame is self-contained: it names its pages and the version of their content, says how
//! they are coded, and carries checksums, so that wrong bytes are never applied silently. Frames may
//! follow each other in a stream or a message; each tells where it ends.
//!
//! | file | subject |
//! |---|---|
//! | [`frame`] | the layout of a frame; reading and checking its header |
//! | [`encode`] | pages in, the fewest fitting frames out |
//! | [`decode`] | the pages of a frame |
//! | [`message`] | what is said beside pages: handover, fault requests, the flight |
//! | [`state`] | device state, and its difference to a rehearsal |
//! | [`limits`] | bounds |

pub mod decode;
pub mod encode;
mod error;
pub mod frame;
#[doc(hidden)]
pub mod fuzz;
pub mod limits;
pub mod message;
mod page_list;
pub mod state;
#[cfg(test)]
mod tests;
mod varint;
mod write;

pub use crate::codec::{CodecChoice, CodecCounts, DeltaCodec, PageCodec};
pub use decode::{DecodeScratch, DecodedPage, DecodedPages};
pub use encode::{CopyToSend, FrameEncoder, LinesToSend, PageToSend};
pub use error::FrameError;
pub use frame::{Base, BaseFor, Frame, FramePage};
