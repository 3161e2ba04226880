//! Device state as it travels: by itself, or as its difference to the state of a rehearsal that the
//! destination keeps.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::message::MessageError;
use crate::codec::blob;
use crate::guest::DEVICE_STATE_LIMIT_BYTES;

/// The guest stands still while its state is coded, so quickly.
const WHOLE_LEVEL: i32 = 1;

/// What has to be coded of a difference is little.
const DIFFERENCE_LEVEL: i32 = 3;

/// The device state of a rehearsal, as both sides keep it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RehearsedState {
    bytes: Vec<u8>,
    check: u64,
}

impl RehearsedState {
    /// Keeps `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        RehearsedState { check: xxh3_64(&bytes), bytes }
    }

    /// The xxh3-64 of the state, by which the two sides know that they mean the same.
    pub fn check(&self) -> u64 {
        self.check
    }
}

/// Device state on its way.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedState {
    /// The [`RehearsedState::check`] of the state that this one is a difference to.
    base: Option<u64>,
    plain_bytes: u64,
    /// The xxh3-64 of the result.
    check: u64,
    /// See [`blob`].
    coded: Vec<u8>,
}

impl std::fmt::Debug for PackedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let against = if self.base.is_some() { " against a rehearsal" } else { "" };
        write!(f, "PackedState({} as {}{against})", self.plain_bytes, self.coded.len())
    }
}

impl PackedState {
    /// Codes `state` against that of a rehearsal which the other side has said to keep.
    pub fn pack(state: &[u8], base: Option<&RehearsedState>) -> Self {
        let (old, level) =
            base.map_or((&[][..], WHOLE_LEVEL), |base| (&base.bytes, DIFFERENCE_LEVEL));
        PackedState {
            base: base.map(RehearsedState::check),
            plain_bytes: state.len() as u64,
            check: xxh3_64(state),
            coded: blob::encode(state, old, level),
        }
    }

    /// Bytes that it takes on the wire, but for a few.
    pub fn coded_bytes(&self) -> usize {
        self.coded.len()
    }

    /// The state. `base` is what is kept of a rehearsal here.
    ///
    /// # Errors
    /// When it is too large, was made against a state that is not kept here, or does not come out as it
    /// went in.
    pub fn unpack(&self, base: Option<&RehearsedState>) -> Result<Vec<u8>, MessageError> {
        let limit_bytes = DEVICE_STATE_LIMIT_BYTES as u64;
        if self.plain_bytes > limit_bytes {
            return Err(MessageError::TooLarge { bytes: self.plain_bytes, limit_bytes });
        }
        let old = match (self.base, base) {
            (None, _) => &[][..],
            (Some(check), Some(base)) if check == base.check => &base.bytes,
            _ => return Err(malformed("device state against a rehearsal that is not kept here")),
        };
        let state = blob::decode(&self.coded, old, self.plain_bytes as usize)
            .map_err(|error| malformed(&format!("device state: {error}")))?;
        match xxh3_64(&state) == self.check {
            true => Ok(state),
            false => Err(malformed("device state that is not what its checksum says")),
        }
    }
}

fn malformed(what: &str) -> MessageError {
    MessageError::Malformed(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> Vec<u8> {
        (0..200_000u32).flat_map(|word| (word / 7 % 1000).to_le_bytes()).collect()
    }

    #[test]
    fn comes_back_by_itself_and_against_a_rehearsal() {
        let rehearsed = RehearsedState::new(state());
        let mut now = state();
        now[100_000] ^= 1;
        let whole = PackedState::pack(&now, None);
        assert_eq!(whole.unpack(Some(&rehearsed)).unwrap(), now);
        let difference = PackedState::pack(&now, Some(&rehearsed));
        assert!(difference.coded_bytes() < whole.coded_bytes() / 10, "{difference:?}, {whole:?}");
        assert_eq!(difference.unpack(Some(&rehearsed)).unwrap(), now);
    }

    #[test]
    fn a_difference_to_another_rehearsal_is_refused() {
        let difference = PackedState::pack(&state(), Some(&RehearsedState::new(state())));
        assert!(difference.unpack(None).is_err());
        assert!(difference.unpack(Some(&RehearsedState::new(vec![1; 1000]))).is_err());
    }

    #[test]
    fn what_does_not_come_out_as_it_went_in_is_refused() {
        let good = PackedState::pack(&state(), None);
        assert!(PackedState { check: good.check ^ 1, ..good.clone() }.unpack(None).is_err());
        assert!(PackedState { plain_bytes: 1 << 40, ..good.clone() }.unpack(None).is_err());
        assert!(PackedState { plain_bytes: good.plain_bytes - 1, ..good }.unpack(None).is_err());
    }
}
