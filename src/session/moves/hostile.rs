//! A peer that holds a valid ticket and lies: it can end its own migration and nothing else.

use bytes::Bytes;

use super::*;
use crate::session::control::ask_cancel;
use crate::transport::{Lane, LinkError, connect};
use crate::wire::message::{ToDestination, ToSource, decode, encode};

mod destination;
mod source;

/// What a liar holds.
type Wire = crate::transport::Link;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap()
}

async fn say<M: serde::Serialize>(link: &Wire, message: &M) {
    // It may have heard enough already.
    let _ = link.control_send(encode(message).into()).await;
}

/// The next message of the honest side.
async fn hear<M: serde::de::DeserializeOwned>(link: &Wire) -> Result<M, LinkError> {
    Ok(decode(&link.control_recv().await?).expect("an honest side speaks plainly"))
}

/// A guest that dirties pages all the time, and is small.
fn small_plan() -> GuestPlan {
    plan(Pattern::Sparse, 20_000, 8, 2)
}
