//! The writing of a frame, from parts that are right.

use xxhash_rust::xxh3::xxh3_64;

use super::frame::{Base, FORMAT, MAGIC, check_bytes, checksum};
use super::{page_list, varint};
use crate::codec::{CodecId, Content};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageRange, Version};

/// What a frame is written from.
pub(super) struct FrameParts<'a> {
    pub(super) codec: CodecId,
    pub(super) version: Version,
    pub(super) runs: &'a [PageRange],
    /// The base of each page; empty for a codec without.
    pub(super) bases: &'a [Base],
    /// What all pages build on, and these as runs; empty for a codec without.
    pub(super) kin: (&'a [Base], &'a [PageRange]),
    /// Changed units in all, for a delta.
    pub(super) units: usize,
    /// The check of each page, where it has one.
    pub(super) checks: &'a [u64],
    pub(super) decoded: &'a [u8],
    pub(super) body: &'a [u8],
}

impl<'a> FrameParts<'a> {
    /// A frame without bases, checks and body.
    pub(super) fn new(codec: CodecId, version: Version, runs: &'a [PageRange]) -> Self {
        FrameParts {
            codec,
            version,
            runs,
            bases: &[],
            kin: (&[], &[]),
            units: 0,
            checks: &[],
            decoded: &[],
            body: &[],
        }
    }

    /// Appends the frame to `out`; gives its length in bytes.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> usize {
        let start = out.len();
        self.put_header(self.body.len(), out);
        let checksum = checksum(xxh3_64(&out[start..]), self.decoded);
        out.extend_from_slice(&checksum.to_le_bytes());
        out.extend_from_slice(self.body);
        out.len() - start
    }

    /// Appends the frame with these pages for its body, as they are: they are copied once.
    pub(super) fn write_pages<'p>(
        &self,
        pages: impl Iterator<Item = &'p PageBytes>,
        out: &mut Vec<u8>,
    ) -> usize {
        let start = out.len();
        let pages_len =
            self.runs.iter().map(PageRange::len).sum::<u64>() as usize * PAGE_SIZE_BYTES;
        self.put_header(pages_len, out);
        let header_hash = xxh3_64(&out[start..]);
        let checksum_at = out.len();
        out.extend_from_slice(&[0; size_of::<u64>()]);
        let body_at = out.len();
        pages.for_each(|page| out.extend_from_slice(page));
        debug_assert_eq!(out.len() - body_at, pages_len);
        let checksum = checksum(header_hash, &out[body_at..]);
        out[checksum_at..body_at].copy_from_slice(&checksum.to_le_bytes());
        out.len() - start
    }

    fn put_header(&self, body_len: usize, out: &mut Vec<u8>) {
        let content = self.codec.content();
        out.extend_from_slice(&[MAGIC, FORMAT, self.codec.to_wire()]);
        varint::put(out, u64::from(self.version.0));
        page_list::put(out, self.runs);
        put_versions(self.bases, out);
        if content == Content::Copy {
            self.bases.iter().for_each(|base| varint::put(out, base.page.0));
        }
        let (kin, runs) = self.kin;
        if !kin.is_empty() {
            page_list::put(out, runs);
            put_versions(kin, out);
        }
        if matches!(content, Content::Words | Content::Lines | Content::Runs) {
            varint::put(out, self.units as u64);
        }
        for check in self.checks {
            out.extend_from_slice(&check.to_le_bytes()[..check_bytes(content)]);
        }
        if content.has_body() {
            varint::put(out, body_len as u64);
        }
    }
}

fn put_versions(bases: &[Base], out: &mut Vec<u8>) {
    let Some((first, others)) = bases.split_first() else { return };
    if others.iter().all(|other| other.version == first.version) {
        varint::put(out, u64::from(first.version.0));
    } else {
        varint::put(out, 0);
        bases.iter().for_each(|base| varint::put(out, u64::from(base.version.0)));
    }
}
