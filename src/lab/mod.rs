//! Experiments on one machine.
//!
//! * [`link`] is the model of one direction of a link, without a socket or a clock; [`spec`] reads link
//!   descriptions as people write them (`100Mbit,40ms,0.1%`); [`moderation`] tells when its far end is shown what
//!   has arrived.
//! * [`relay`] puts two such links between two UDP sockets, in this process and without privileges.
//!   `tools/wan` puts the same model between two network namespaces ([`netns`]).
//! * [`replay`] is the second half of a migration without guest, link or clock: for comparing the orders in
//!   which pages can go.
//! * [`stage`] has the guests, the namespaces and the processes of an experiment; [`experiment`] goes
//!   through a matrix of guests, links and methods and tells what came of it (`farfault lab`).
//! * [`estimate`] looks at a running guest and tells what a migration would be like.

pub mod estimate;
pub mod experiment;
pub mod link;
pub mod moderation;
pub mod netns;
pub mod relay;
pub mod replay;
pub mod spec;
pub mod stage;
