//! farfault moves a running virtual machine to another host over QUIC: a short pre-copy in which
//! changed pages travel as deltas, then the guest resumes on the destination and faults in what it still
//! misses, while the rest is pushed, as deltas against the older copies that are there already.
//!
//! It works from outside the virtual machine monitor: an unmodified QEMU shares its guest RAM as a
//! file, and farfault maps that file, follows the writes to it, and serves its page faults with a
//! userfaultfd made inside QEMU's process. QEMU itself only stops, hands over its device state, and runs.
//!
//! # A migration in one page
//!
//! 1. **Connect.** `farfault receive` starts a QEMU that waits for a guest, or attaches to one, and
//!    prints a ticket ([`transport::Ticket`]); `farfault send` proves that it holds it. Both ends now have a
//!    [`transport::Link`]: one QUIC connection with *lanes*, so that a fault never stands behind bulk.
//! 2. **Prepare.** The source tells the guest's [`guest::Shape`], the destination compares it with its
//!    own and registers all its RAM with a [`memory::Userfault`]: from here on every first touch of a
//!    page there is a fault, whatever lies in the page cache.
//! 3. **Pre-copy.** Round by round the source sends what the [`memory::DirtyTracker`] has found changed
//!    ([`engine::precopy`]). The number of the round is the [`page::Version`] of the contents it sends. What was sent
//!    is kept, bounded ([`codec::SentPages`]), and when the destination has acknowledged a round, its contents are
//!    bases for deltas. The destination claims each page in the [`memory::PageTable`], decodes it, and
//!    writes it through its alias of the RAM, where the guest cannot reach it yet: such a page is *stale*.
//! 4. **Freeze.** When the changes, *encoded*, fit the downtime budget, or rounds no longer pay
//!    ([`engine::policy`]), the guest is stopped, the last changes are collected and the device state is saved. Now the
//!    source's RAM does not change any more. Which pages the destination still needs travels with the
//!    device state in one message, the *flight* ([`wire::message::Flight`]).
//! 5. **Commit.** The source writes its decision to the journal ([`session::journal`]) and says so; from then
//!    on it never runs this guest again unless the destination refuses it. The destination loads the device state,
//!    journals, and lets the guest run. Until the decision every failure lets the guest run on at the source.
//! 6. **Post-copy.** The guest runs on the destination. Stale pages that were not named in the flight are
//!    current and are mapped in the background. A thread that touches a page still needed waits for it: the
//!    [`memory::FaultServer`] asks the source, which answers ahead of all bulk, neighbours along with it. Meanwhile the
//!    pusher ([`engine::pusher`]) sends the rest, from the last fault on. A page is written once: what comes for
//!    a page that the guest owns is dropped.
//! 7. **Done.** Every page is in place, both journals are removed, both sides print a [`report::Report`].
//!
//! # The rooms
//!
//! Dependencies point downward only.
//!
//! | room | subject | begin with |
//! |---|---|---|
//! | [`cli`] | arguments and wording, one file a subcommand | `cli/send.rs` |
//! | [`lab`] | an emulated link, and experiments with real guests over it | [`lab::link`], [`lab::experiment`] |
//! | [`session`] | one migration, driven: the engine's decisions carried out | [`session::source`] beside [`session::destination`] |
//! | [`report`] | counters, progress, a live picture, JSON lines, the report | [`report::Report`] |
//! | [`engine`] | the decisions, without clock, socket or thread | [`engine::source`] beside [`engine::destination`] |
//! | [`transport`] | tickets, QUIC, lanes, congestion control | [`transport::Lane`], [`transport::congestion`] |
//! | [`wire`] | page frames and messages, and the limits on both | [`wire::frame`], [`wire::message`] |
//! | [`codec`] | page bytes to coded bytes and back: pure functions | [`codec::delta`], [`codec::bases`] |
//! | [`guest`] | what is moved: two traits; QEMU, and two built-in guests | [`guest`], [`guest::qemu`] |
//! | [`memory`] | aliases, holes, write tracking, page table, faults, adoption of a process | [`memory::PageTable`], [`memory::FaultServer`] |
//! | [`page`], [`units`] | the vocabulary: pages, versions, page sets; sizes and rates as people write them | [`page`] |
//!
//! To move the guests of another monitor, implement [`guest::SourceGuest`] and
//! [`guest::DestinationGuest`]; `examples/tiny_vmm.rs` is a small one. The books are in `docs/`: the operator's
//! guide, how it works, the protocol, operations, experiments.
//!
//! # Rules of the house
//!
//! * The guest never runs at two places: `engine/handover_tests.rs` and `session/simulation` look after every step of random
//!   schedules of failures.
//! * Whatever the network says is bounded before it is used ([`wire::limits`], [`transport::Lane`]).
//! * A page that was not checked is not shown to the guest; a copy that may be torn is sent only because the
//!   write that tore it marks the page dirty.
//! * `unsafe` stays in `memory/` and `guest/kvm/`, each block with its reason.

pub mod cli;
pub mod codec;
mod cores;
pub mod engine;
#[cfg(test)]
mod fuzz_cases;
pub mod guest;
pub mod lab;
mod meminfo;
pub mod memory;
pub mod page;
pub mod report;
pub mod session;
pub mod transport;
pub mod units;
pub mod wire;
