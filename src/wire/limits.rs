//! Bounds on what is read from the network and on what is written to it.

use crate::codec::delta::WordMask;
use crate::page::PAGE_SIZE_BYTES;

/// Pages in a frame that carries page bytes.
pub const MAX_PAGES_PER_FRAME: usize = 64;

/// Runs in the page list of a frame. A frame of zero pages may name any number of pages in them.
pub const MAX_RUNS_PER_FRAME: usize = 1024;

/// Bytes of a frame's body, and of what it decodes to.
pub const MAX_BODY_BYTES: usize = MAX_PAGES_PER_FRAME * (PAGE_SIZE_BYTES + WordMask::BYTES);

/// Bytes of a frame's header: two numbers for each run, or four for each page, are its longest.
pub const MAX_HEADER_BYTES: usize = 64 + MAX_RUNS_PER_FRAME * 2 * super::varint::MAX_BYTES;

/// Bytes of a whole frame.
pub const MAX_FRAME_BYTES: usize = MAX_HEADER_BYTES + MAX_BODY_BYTES;
