//! Faults that are built into a simulated session on purpose: each must be caught, so that the
//! invariants are known to be able to fail.

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// The journal says that a record is on disk before it is.
    AnswerBeforeTheDisk,
    /// After an outage every page of the round is taken to have arrived.
    BelieveTheRoundArrived,
    /// A page that did not pass its check is not asked for again.
    ForgetRejectedPages,
    /// After an outage in post-copy the pusher does not go back.
    DoNotSendAgain,
    /// A delta is made against what was rejected, and applied to whatever is there.
    ApplyToAnyBase,
    /// A page is written although the guest has it.
    OverwriteMapped,
    /// A fault is resolved with the older copy.
    MapStale,
    /// The destination runs the guest as soon as it is loaded.
    RunBeforeCommit,
    /// A guest that has run is discarded.
    DiscardWhatRan,
    /// The source resumes its guest whatever it has said.
    ResumeWhenInDoubt,
    /// Messages of a lost link are heard on the next.
    HearTheOldLink,
    /// The destination forgets to say that it runs.
    ForgetRunning,
    /// The pusher begins again and again.
    PushWithoutEnd,
    /// The source lets go of the guest's memory as soon as the guest runs at the destination.
    ForgetFrozenPages,
    /// The source does not look for another link.
    GiveUpAtOnce,
    /// A source that takes over lets the guest run although it was decided.
    ForgetTheDecision,
    /// A destination that takes over lets a guest run that was only loaded.
    RunWhatIsLoaded,
    /// A destination that takes over takes a page that was half written for a whole one.
    TrustTornPages,
    /// A source that takes over believes that every page has arrived where the guest runs.
    TakeRunningForComplete,
}

impl Mutation {
    pub(super) const ALL: [Mutation; 19] = [
        Mutation::AnswerBeforeTheDisk,
        Mutation::BelieveTheRoundArrived,
        Mutation::ForgetRejectedPages,
        Mutation::DoNotSendAgain,
        Mutation::ApplyToAnyBase,
        Mutation::OverwriteMapped,
        Mutation::MapStale,
        Mutation::RunBeforeCommit,
        Mutation::DiscardWhatRan,
        Mutation::ResumeWhenInDoubt,
        Mutation::HearTheOldLink,
        Mutation::ForgetRunning,
        Mutation::PushWithoutEnd,
        Mutation::ForgetFrozenPages,
        Mutation::GiveUpAtOnce,
        Mutation::ForgetTheDecision,
        Mutation::RunWhatIsLoaded,
        Mutation::TrustTornPages,
        Mutation::TakeRunningForComplete,
    ];
}
