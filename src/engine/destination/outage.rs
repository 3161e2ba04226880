//! A lost link, and where the two sides stand when there is another.

use super::*;

impl DestinationMachine {
    pub(super) fn link_down(&mut self) {
        if matches!(self.link, Reach::Down | Reach::Lost) {
            return;
        }
        self.link = Reach::Down;
        self.outages += 1;
        self.asked = false;
        // Perhaps it was not heard.
        self.refusal_told = false;
        if self.state == State::Completing {
            // Complete and running: only the source does not know yet.
            self.release();
        }
    }

    /// The source asks where this side stands. What it says of itself must fit.
    pub(super) fn resync(&mut self, at: SourceStage) {
        use State::*;
        let outage = self.outages;
        self.asked = true;
        match (self.state, at) {
            (Discarding, _) if self.refused => self.answer(None),
            // As soon as the refusal is on disk.
            (Discarding, _) | (Ended, _) => {}
            (Waiting | Preparing | Receiving, SourceStage::Preparing)
            | (Receiving | Offered, SourceStage::Decided) => self.answer(None),
            (Completing, SourceStage::Decided) if self.complete_noted => self.answer(None),
            (Receiving, SourceStage::Round(round)) => {
                let of = PagesOf::Round(round);
                self.act(DestinationAction::CollectPages { outage, of });
            }
            (
                Loading | Loaded | Committing | Starting | Postcopy | Completing,
                SourceStage::Decided,
            ) => {
                let of = PagesOf::Remainder;
                self.act(DestinationAction::CollectPages { outage, of });
            }
            (state, at) => {
                let text = format!("the source says it is {at:?} while {state:?}");
                self.fail(Failure::plain(text));
            }
        }
    }

    /// Tells where this side stands. From here on the link is as good as the one before.
    pub(super) fn answer(&mut self, pages: Option<PagesHere>) {
        let (held, lacking) = match pages {
            Some(PagesHere::Held(held)) => (Some(held), None),
            Some(PagesHere::Lacking(lacking)) => (None, Some(lacking)),
            None => (None, None),
        };
        let at = match (self.state, lacking) {
            (State::Waiting, _) => DestinationStage::Waiting,
            (State::Preparing, _) => DestinationStage::Preparing,
            (State::Receiving | State::Offered, _) => {
                // An offer without its flight is void, and so is a decision about it: all come again.
                self.state = State::Receiving;
                self.committed = false;
                DestinationStage::Receiving { held }
            }
            (
                State::Loading | State::Loaded | State::Committing | State::Starting,
                Some(lacking),
            ) => DestinationStage::Loading { committed: self.committed, lacking },
            (State::Completing, _) if self.complete_noted => DestinationStage::Done,
            (State::Postcopy | State::Completing, Some(lacking)) => {
                DestinationStage::Running { lacking }
            }
            (State::Discarding, _) if self.refused => {
                let Failure { reason, hint } = self.reason_to_discard();
                self.refusal_told = true;
                DestinationStage::Refused { reason, hint }
            }
            // As soon as the refusal is on disk; or it is over.
            _ => return,
        };
        self.asked = false;
        self.awaited_round = None;
        self.link = Reach::Up;
        self.act(DestinationAction::Send(ToSource::Resync { at, running_us: None }));
        self.end_when_due();
    }

    pub(super) fn lose_link(&mut self, failure: Failure) {
        if std::mem::replace(&mut self.link, Reach::Lost) == Reach::Lost {
            return;
        }
        self.asked = false;
        match self.state {
            State::Ended => {}
            State::Discarding => self.end_when_due(),
            // Decided, and nothing more is needed from the source.
            State::Loading | State::Loaded | State::Committing | State::Starting
                if self.committed && self.complete => {}
            // Complete and running; the source's Bye is only a courtesy.
            State::Completing => self.release(),
            State::Starting | State::Postcopy => {
                self.end(DestinationOutcome::LostPages(failure));
            }
            // The decision may have been made and lost on the way.
            State::Offered | State::Loading | State::Loaded if !self.committed => {
                let hint = "ask the source: if it says that the guest runs there, end this one; \
                            the source lets it run on when it has not decided";
                self.end(DestinationOutcome::InDoubt(Failure::new(failure.reason, hint)));
            }
            _ => self.discard(failure),
        }
    }
}
