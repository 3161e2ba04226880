//! One flow of ours on the link: rates, buffers, loss, and changes of the path.

use std::time::Duration;

use super::*;

/// The bulk rate and the queue after `warm_up` seconds of a steady path.
fn steady(path: Path, warm_up: f64) -> Measured {
    let mut link = Link::new(path);
    link.run_until(warm_up);
    link.run_until(warm_up + 30.0)
}

#[test]
fn a_wan_link_is_full_with_a_few_milliseconds_of_queue_whatever_the_buffer_and_the_loss() {
    for queue_bdp in [1.0, 10.0] {
        for loss in [0.0, 0.001, 0.01] {
            let measured = steady(path(100.0, 40, queue_bdp, loss), 3.0);
            let case = format!("{queue_bdp} BDP, loss {loss}: {measured:?}");
            assert!(measured.mbit > 100.0 * (1.0 - loss) * 0.975, "{case}");
            assert!(measured.queue_p50_ms < 5.0, "{case}");
            assert!(measured.queue_p99_ms < 8.0, "{case}");
        }
    }
}

#[test]
fn a_slow_and_long_link_with_loss_is_full() {
    let measured = steady(path(20.0, 100, 2.0, 0.01), 3.0);
    assert!(measured.mbit > 19.0, "{measured:?}");
    assert!(measured.queue_p50_ms < 6.0, "{measured:?}");
}

#[test]
fn a_sender_on_a_busy_host_keeps_most_of_the_rate() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.stall = Some((Duration::from_millis(70), Duration::from_millis(25)));
    link.run_until(3.0);
    let measured = link.run_until(30.0);
    assert!(measured.mbit > 90.0, "{measured:?}");
    assert!(measured.queue_p99_ms < 32.0, "what gathers while it does not run: {measured:?}");
}

/// Both have so much more to do than processors that nearly every delay is theirs. Cuts for those once left a
/// hundredth of the link.
#[test]
fn two_hosts_that_are_too_busy_keep_most_of_the_rate() {
    let busy = [(12, 6), (20, 12)];
    let links = [
        (200.0, 10, [0.75, 0.5]),
        (100.0, 20, [0.8, 0.35]),
        (100.0, 40, [0.8, 0.25]),
        (1000.0, 1, [0.8, 0.45]),
    ];
    for (mbit, rtt_ms, shares) in links {
        for ((period_ms, length_ms), share) in busy.into_iter().zip(shares) {
            let mut link = Link::new(path(mbit, rtt_ms, 10.0, 0.0));
            let stall = (Duration::from_millis(period_ms), Duration::from_millis(length_ms));
            (link.stall, link.receiver_stall) = (Some(stall), Some(stall));
            link.stalls_vary = true;
            link.run_until(10.0);
            let measured = link.run_until(30.0);
            let case = format!("{rtt_ms} ms, {length_ms} of {period_ms} ms: {measured:?}");
            assert!(measured.mbit > share * mbit, "{case}");
            assert!(measured.queue_p50_ms < 20.0, "{case}");
        }
    }
}

#[test]
fn a_sender_that_is_often_kept_waiting_for_moments_keeps_the_rate_and_the_queue() {
    for loss in [0.0, 0.01] {
        let mut link = Link::new(path(100.0, 40, 10.0, loss));
        link.stall = Some((Duration::from_millis(10), Duration::from_millis(4)));
        link.run_until(3.0);
        let measured = link.run_until(30.0);
        assert!(measured.mbit > 97.0, "loss {loss}: {measured:?}");
        assert!(measured.queue_p99_ms < 15.0, "loss {loss}: {measured:?}");
    }
}

#[test]
fn a_data_centre_link_is_full_with_a_short_queue_whatever_the_network_card_holds_back() {
    for interrupts_us in [None, Some(50), Some(150)] {
        let mut link = Link::new(path(1000.0, 1, 10.0, 0.0));
        link.interrupts = interrupts_us.map(Duration::from_micros);
        link.run_until(1.0);
        let measured = link.run_until(30.0);
        assert!(measured.mbit > 970.0, "{interrupts_us:?}: {measured:?}");
        assert!(measured.queue_p50_ms < 0.6, "{interrupts_us:?}: {measured:?}");
    }
}

#[test]
fn a_busy_host_keeps_the_window_of_a_short_path() {
    for (period_ms, length_ms, mbit) in [(10, 2, 800.0), (10, 4, 600.0), (25, 8, 600.0)] {
        let mut link = Link::new(path(1000.0, 1, 10.0, 0.0));
        link.stall = Some((Duration::from_millis(period_ms), Duration::from_millis(length_ms)));
        link.run_until(1.0);
        let measured = link.run_until(4.0);
        assert!(measured.mbit > mbit, "{length_ms} of {period_ms} ms: {measured:?}");
        assert!(measured.queue_p99_ms < 2.0, "{length_ms} of {period_ms} ms: {measured:?}");
    }
}

#[test]
fn packets_that_a_network_card_holds_back_are_not_taken_for_a_faster_link() {
    for (mbit, rtt_ms) in [(100.0, 40), (1000.0, 20)] {
        let mut link = Link::new(path(mbit, rtt_ms, 10.0, 0.0));
        link.interrupts = Some(Duration::from_micros(50));
        let start = link.run_until(1.0);
        assert!(start.queue_max_ms < 10.0, "{start:?}");
        let then = link.run_until(2.0);
        assert!(then.mbit > 0.92 * mbit, "{then:?}");
    }
}

#[test]
fn while_nobody_waits_a_busy_host_keeps_the_rate_of_a_short_path() {
    let rtt = Duration::from_micros(100);
    let path = Path { rate_bytes_per_s: 125e6, rtt, queue_bytes: 4e6, loss: 0.0 };
    let mut link = Link::new_while_nobody_waits(path);
    link.stall = Some((Duration::from_millis(5), Duration::from_millis(1)));
    link.run_until(1.0);
    let measured = link.run_until(4.0);
    assert!(measured.mbit > 900.0, "{measured:?}");
    assert!(measured.queue_p99_ms < 10.0, "{measured:?}");
}

#[test]
fn the_start_fills_the_link_within_a_second_and_never_a_deep_buffer() {
    for (mbit, rtt_ms) in [(100.0, 40), (25.0, 80), (1000.0, 20)] {
        let mut link = Link::new(path(mbit, rtt_ms, 10.0, 0.0));
        let start = link.run_until(1.0);
        assert!(start.queue_max_ms < 10.0, "{start:?}");
        assert_eq!(start.dropped, 0);
        let then = link.run_until(2.0);
        assert!(then.mbit > 0.92 * mbit, "{then:?}");
        assert!(then.queue_max_ms < 10.0, "{then:?}");
    }
}

#[test]
fn a_start_that_bursts_tell_nothing_of_has_one_overshoot_and_not_two() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    // Another pacer, without bursts.
    link.flows[0].offered = Some(25e6);
    let start = link.run_until(0.4);
    assert!(start.queue_max_ms < 50.0, "{start:?}");
    let then = link.run_until(2.0);
    assert!(then.queue_max_ms < 10.0 && then.mbit > 92.0, "{then:?}");
}

/// Half a second of round trip: what is lost by a start that ends too early is regained in tens of round trips.
#[test]
fn a_busy_host_does_not_end_the_start_on_a_very_long_path() {
    for stall_ms in [None, Some((10, 4)), Some((25, 12))] {
        for (mbit, rtt_ms) in [(200.0, 600), (50.0, 300)] {
            let mut link = Link::new(path(mbit, rtt_ms, 2.0, 0.0));
            link.stall = stall_ms.map(|(period, length)| {
                (Duration::from_millis(period), Duration::from_millis(length))
            });
            let round_trip_s = rtt_ms as f64 * 1e-3;
            link.run_until(16.0 * round_trip_s);
            let then = link.run_until(24.0 * round_trip_s);
            // Paced a quarter faster than a window per round trip, it cannot use more of one than it is awake for.
            let share = if stall_ms.is_some() { 0.65 } else { 0.95 };
            assert!(then.mbit > share * mbit, "{stall_ms:?}: {then:?}");
        }
    }
}

/// However the window came to be so small, it is a matter of some tens of round trips.
#[test]
fn a_window_that_is_far_too_small_grows_by_more_each_round_trip() {
    for rtt_ms in [40, 600] {
        let mut link = Link::new(path(100.0, rtt_ms, 2.0, 0.0));
        link.path.rate_bytes_per_s /= 50.0;
        link.run_until(60.0 * rtt_ms as f64 * 1e-3);
        let held_bytes = 12.5e6 * rtt_ms as f64 * 1e-3;
        let window = link.flows[0].control.window() as f64;
        assert!(window < 0.05 * held_bytes, "{window}");
        link.path.rate_bytes_per_s *= 50.0;
        link.run_until(95.0 * rtt_ms as f64 * 1e-3);
        let then = link.run_until(100.0 * rtt_ms as f64 * 1e-3);
        assert!(then.mbit > 80.0, "{rtt_ms}: {then:?}");
    }
}

#[test]
fn a_start_on_one_bdp_of_buffer_loses_nothing() {
    let start = Link::new(path(100.0, 40, 1.0, 0.0)).run_until(2.0);
    assert_eq!(start.dropped, 0, "{start:?}");
}

#[test]
fn a_start_on_a_busy_host_does_not_overshoot() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.stall = Some((Duration::from_millis(10), Duration::from_millis(4)));
    let start = link.run_until(2.0);
    assert!(start.queue_max_ms < 20.0, "{start:?}");
    let then = link.run_until(4.0);
    assert!(then.mbit > 97.0, "{then:?}");
}

#[test]
fn a_link_that_becomes_ten_times_slower_has_a_short_queue_again_soon() {
    let mut link = Link::new(path(100.0, 40, 1.0, 0.0));
    link.run_until(5.0);
    link.path.rate_bytes_per_s /= 10.0;
    link.run_until(8.0);
    let after = link.run_until(20.0);
    assert!(after.mbit > 9.4, "{after:?}");
    assert!(after.queue_p50_ms < 8.0, "{after:?}");
}

/// The cut for it is right, although the link is idle for a moment after it.
#[test]
fn a_link_that_becomes_slower_has_a_short_queue_again_at_once() {
    for (mbit, rtt_ms) in [(100.0, 10), (100.0, 40), (100.0, 100), (1000.0, 20)] {
        for slower in [0.3, 0.4, 0.5, 0.6, 0.8] {
            let mut link = Link::new(path(mbit, rtt_ms, 10.0, 0.0));
            link.run_until(5.0);
            link.path.rate_bytes_per_s *= slower;
            link.run_until(7.0);
            let after = link.run_until(12.0);
            let case = format!("{mbit} Mbit/s, {rtt_ms} ms, {slower}: {after:?}");
            assert!(after.mbit > 0.93 * slower * mbit, "{case}");
            assert!(after.queue_p50_ms < 6.0 && after.queue_p99_ms < 16.0, "{case}");
        }
    }
}

#[test]
fn a_link_that_becomes_ten_times_faster_is_filled_soon() {
    let mut link = Link::new(path(10.0, 40, 10.0, 0.0));
    link.run_until(5.0);
    link.path.rate_bytes_per_s *= 10.0;
    let change = link.run_until(6.5);
    assert!(change.queue_max_ms < 60.0, "{change:?}");
    let after = link.run_until(12.0);
    assert!(after.mbit > 95.0 && after.queue_p50_ms < 6.0, "{after:?}");
}

#[test]
fn a_link_that_becomes_a_little_faster_is_filled_without_a_long_queue() {
    let cases = [(1.05, 8.0), (1.1, 8.0), (1.15, 8.0), (1.2, 8.0), (1.3, 14.0), (1.5, 25.0)];
    for (faster, longest_ms) in cases {
        let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
        link.run_until(5.0);
        link.path.rate_bytes_per_s *= faster;
        let change = link.run_until(7.0);
        assert!(change.queue_max_ms < longest_ms, "{faster}: {change:?}");
        let after = link.run_until(9.0);
        assert!(after.mbit > 96.5 * faster, "{faster}: {after:?}");
    }
}

#[test]
fn a_longer_route_is_taken_for_what_it_is() {
    let mut link = Link::new(path(100.0, 40, 1.0, 0.0));
    link.run_until(5.0);
    link.path.rtt = Duration::from_millis(80);
    link.run_until(8.0);
    let after = link.run_until(16.0);
    assert!(after.mbit > 93.0, "{after:?}");
    assert!(after.queue_p50_ms < 8.0, "{after:?}");
}

#[test]
fn a_host_that_has_become_slow_to_answer_is_not_taken_for_a_queue() {
    for added_us in [600, 800, 1500] {
        let mut link = Link::new(path(1000.0, 1, 10.0, 0.0));
        link.run_until(1.0);
        link.path.rtt += Duration::from_micros(added_us);
        link.run_until(1.5);
        let after = link.run_until(5.0);
        assert!(after.mbit > 900.0, "{added_us} us: {after:?}");
        assert!(after.queue_p50_ms < 1.0, "{added_us} us: {after:?}");
    }
}

#[test]
fn the_base_rtt_does_not_creep_up_in_minutes_of_bulk() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.run_until(300.0);
    let late = link.run_until(330.0);
    assert!(late.mbit > 97.0 && late.queue_p50_ms < 6.0, "{late:?}");
}

#[test]
fn a_buffer_shorter_than_the_target_costs_no_more_loss_than_is_tolerated() {
    let shallow = Path { queue_bytes: 20_000.0, ..path(100.0, 40, 1.0, 0.0) };
    let measured = steady(shallow, 3.0);
    let sent = measured.mbit * 1e6 / 8.0 * 30.0 / PACKET_BYTES as f64;
    assert!(measured.mbit > 92.0, "{measured:?}");
    assert!((measured.dropped as f64) < sent * 0.06, "{measured:?}");
}

#[test]
fn a_sender_with_little_to_say_does_not_inflate_its_window() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.flows[0].offered = Some(250_000.0);
    link.run_until(20.0);
    let window = link.flows[0].control.window();
    assert!(window < 100_000, "{window}");
}
