//! Our flow beside others: what `docs/faults.md` says of it.

use super::*;

/// What both got from 20 s after the other one began to 40 s after. Ours is the first.
fn beside(path: Path, join: fn(&mut Link)) -> (Link, Measured) {
    let mut link = Link::new(path);
    link.run_until(10.0);
    join(&mut link);
    link.run_until(30.0);
    let seen = link.run_until(50.0);
    (link, seen)
}

const BUFFERS_BDP: [f64; 3] = [1.0, 2.0, 10.0];

#[test]
fn two_of_ours_fill_the_link_with_a_short_queue_and_the_second_gets_a_share() {
    for (mbit, rtt_ms) in [(100.0, 40), (25.0, 80)] {
        for queue_bdp in BUFFERS_BDP {
            let (_, seen) = beside(path(mbit, rtt_ms, queue_bdp, 0.0), Link::join_ours);
            let case = format!("{mbit} Mbit/s, {rtt_ms} ms, {queue_bdp} BDP: {seen:?}");
            assert!(seen.mbit > 0.97 * mbit, "{case}");
            assert!(seen.queue_p50_ms < 6.0, "{case}");
            assert!(seen.mbit_each.iter().all(|each| *each > 0.05 * mbit), "{case}");
        }
    }
}

#[test]
fn a_tcp_flow_gets_the_most_of_the_link_but_not_all_of_it_and_gives_it_back() {
    for (mbit, rtt_ms) in [(100.0, 40), (25.0, 80)] {
        for queue_bdp in BUFFERS_BDP {
            let (mut link, seen) = beside(path(mbit, rtt_ms, queue_bdp, 0.0), Link::join_cubic);
            let case = format!("{mbit} Mbit/s, {rtt_ms} ms, {queue_bdp} BDP: {seen:?}");
            assert!(seen.mbit > 0.97 * mbit, "{case}");
            let ours = seen.mbit_each[0] / mbit;
            assert!((0.03..0.5).contains(&ours), "{case}");
            link.leave(1);
            link.run_until(55.0);
            let then = link.run_until(60.0);
            let case = format!("{case}, then {then:?}");
            assert!(then.mbit_each[0] > 0.9 * mbit && then.queue_p50_ms < 8.0, "{case}");
        }
    }
}
