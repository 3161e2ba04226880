//! A lost link, and where the two sides stand when there is another.

use super::*;

impl SourceMachine {
    pub(super) fn link_down(&mut self, failure: Failure) {
        if matches!(self.link, Reach::Down | Reach::Lost) {
            return;
        }
        self.link = Reach::Down;
        self.deadline = None;
        if matches!(self.state, State::Freezing(..) | State::Offered | State::Deciding) {
            self.fail(failure, false);
        }
    }

    pub(super) fn link_up(&mut self) {
        let at = match self.state {
            State::Preparing => SourceStage::Preparing,
            State::Sending(round) | State::Draining(round, _) => SourceStage::Round(round),
            State::Committed | State::Postcopy => SourceStage::Decided,
            _ => return,
        };
        if self.link == Reach::Down {
            self.link = Reach::Resyncing;
            self.act(SourceAction::Send(ToDestination::Resync { at }));
        }
    }

    /// The destination has said where it stands: goes on from there.
    pub(super) fn resync(&mut self, now: Duration, at: DestinationStage) {
        use DestinationStage as At;
        self.link = Reach::Up;
        match (self.state, at) {
            (_, At::Refused { reason, hint }) => self.handle_refused(reason, hint),
            (State::Preparing, At::Waiting) => {
                if let Some(hello) = self.hello.clone() {
                    self.say(*hello);
                }
                self.wait(now, self.config.timeouts.prepare);
            }
            (State::Preparing, At::Preparing) => self.wait(now, self.config.timeouts.prepare),
            (State::Preparing, At::Receiving { .. }) => self.prepared(),
            // That acknowledges the round. Another one follows in any case: the guest has gone on
            // writing, for longer than the round's figures know.
            (
                State::Sending(round) | State::Draining(round, _),
                At::Receiving { held: Some(held) },
            ) => {
                self.act(SourceAction::EndRound { held });
                self.broken_rounds += 1;
                match round.next() {
                    Some(next) => self.start_round(next),
                    None => {
                        self.fail(Failure::plain("no more pre-copy rounds are possible"), true);
                    }
                }
            }
            (State::Committed, At::Receiving { .. }) => {
                let Some((final_version, run_when)) = self.offer else {
                    // Without a device state the guest can run nowhere else, now or ever.
                    let reason = "the device state was lost with the farfault that had it";
                    let failure = Failure::plain(reason);
                    self.abort(&failure);
                    return self.void(failure);
                };
                self.say(ToDestination::Offer { final_version, run_when });
                self.act(SourceAction::SendFlight);
                self.act(SourceAction::SendRemainder);
                self.say(ToDestination::Commit);
                self.wait_for_running(now);
            }
            (State::Committed, At::Loading { committed, lacking }) => {
                self.act(SourceAction::SendLacking(lacking));
                if !committed {
                    self.say(ToDestination::Commit);
                }
                self.wait_for_running(now);
            }
            (State::Committed, At::Running { lacking }) => {
                self.running();
                self.act(SourceAction::SendLacking(lacking));
            }
            (State::Postcopy, At::Running { lacking }) => {
                self.act(SourceAction::SendLacking(lacking));
            }
            (State::Committed, At::Done) => {
                self.running();
                self.done();
            }
            (State::Postcopy, At::Done) => self.done(),
            (state, at) => {
                let stage = stage_name(&at);
                self.fail(
                    Failure::plain(format!("the destination is {stage} while {state:?}")),
                    true,
                );
            }
        }
    }
}

fn stage_name(stage: &DestinationStage) -> &'static str {
    match stage {
        DestinationStage::Waiting => "waiting",
        DestinationStage::Preparing => "preparing",
        DestinationStage::Receiving { .. } => "receiving",
        DestinationStage::Loading { .. } => "loading",
        DestinationStage::Running { .. } => "running",
        DestinationStage::Done => "done",
        DestinationStage::Refused { .. } => "refusing",
    }
}
